"""Mixtures of experts: every expert's matrices as linears of their own.

transformers 5 keeps the matrices of all experts of a layer in one tensor [experts, out, in] and multiplies by slices of it. A
pass of llmc works on linears. So the module with the stacked tensors is replaced by `Experts`, which has a linear for each
matrix and computes the same. Its linears may be without weights: they are filled when the expert runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from llmc.errors import UserError

DOWN = "down_proj"  # transformers' name of the second product, in every architecture
Fill = Callable[[Iterable[nn.Module]], AbstractContextManager[None]]


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds the stacked matrices of experts, in the form that transformers marks with
    `use_experts_implementation`, or in Llama 4's."""
    marked = all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate"))
    return marked or _is_scattered(module)


def _is_scattered(module: nn.Module) -> bool:
    """Whether a module's experts get one tensor [experts * tokens, in], in which all rows are zero that the router does not
    send to an expert (Llama 4). The stacked matrices are [experts, in, out] then."""
    stacked = [n for n, p in module._parameters.items() if p is not None and p.ndim == 3]
    return stacked == ["gate_up_proj", DOWN] and len(inspect.signature(type(module).forward).parameters) == 2


def count_of(module: nn.Module) -> int:
    """The number of experts of a fused module."""
    return int(module.get_parameter(DOWN).shape[0])


class Experts(nn.Module):
    """The experts of one layer. `experts.3.down_proj` is a linear.

    leaves: {stacked parameter: names of its linears in each expert}. A stacked [gate; up] that the files keep as two matrices
    has two names; their outputs are concatenated.
    """

    def __init__(self, fused: Any, leaves: dict[str, tuple[str, ...]]) -> None:
        super().__init__()
        self.leaves = leaves
        self.scattered = _is_scattered(fused)
        self.transposed = is_transposed(fused)
        self.count = self.num_experts = count_of(fused)  # the second for transformers' code around it
        self.fill: Fill = lambda _linears: nullcontext()
        self.first = next(name for name in leaves if name != DOWN)
        shapes = {name: _shape(fused, name) for name in leaves}
        stacked = {name: p for name, p in fused.named_parameters(recurse=False) if name in leaves}
        for number in range(self.count):
            expert = nn.Module()
            for name, parts in leaves.items():
                out, width = shapes[name]
                for i, leaf in enumerate(parts):
                    linear = _empty(out // len(parts), width)
                    if stacked[name].device.type != "meta":
                        value = stacked[name].data[number]
                        value = value.t() if self.transposed else value
                        linear.weight = nn.Parameter(value.chunk(len(parts), 0)[i].contiguous(), requires_grad=False)
                    expert.add_module(leaf, linear)
            self.add_module(str(number), expert)
        for name, p in list(fused.named_parameters(recurse=False)):
            if name in leaves:
                del fused._parameters[name]
            else:  # biases
                self.register_parameter(name, p)
        for name, child in fused.named_children():
            self.add_module(name, child)
        self.routed = Routed(self)
        object.__setattr__(self, "_fused", fused)  # its gate and activation; it is no child, so it has no names here

    def linears(self, number: int) -> dict[str, nn.Linear]:
        """{name inside this module: linear} of one expert, in the order in which they run."""
        order = (*self.leaves[self.first], *self.leaves[DOWN])
        return {f"{number}.{leaf}": self.get_submodule(f"{number}.{leaf}") for leaf in order}  # type: ignore[misc]

    def into(self, number: int) -> list[str]:
        """The names of the expert's linears that read its input."""
        return [f"{number}.{leaf}" for leaf in self.leaves[self.first]]

    def out(self, number: int) -> str:
        """The name of the expert's linear that makes its output."""
        return f"{number}.{self.leaves[DOWN][0]}"

    def inner(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """The input of the expert's last linear [rows, inner] for the expert's input x [rows, in]."""
        up = torch.cat([self.get_submodule(name)(x) for name in self.into(number)], dim=-1)
        bias = getattr(self, f"{self.first}_bias", None)
        if bias is not None:
            up = up + bias[number]
        fused: Any = self._fused
        if self.scattered:
            gate, linear = up.chunk(2, dim=-1)
            return fused.act_fn(gate) * linear  # type: ignore[no-any-return]
        return fused._apply_gate(up) if fused.has_gate else fused.act_fn(up)  # type: ignore[no-any-return]

    def outer(self, number: int, inner: torch.Tensor) -> torch.Tensor:
        """The expert's output [rows, out] for the input of its last linear."""
        y: torch.Tensor = self.get_submodule(self.out(number))(inner)
        bias = getattr(self, f"{DOWN}_bias", None)
        if bias is not None:
            y = y + bias[number]
        norm = getattr(self, "post_expert_norm", None)
        return y if norm is None else norm(y)

    def bias_out(self, number: int) -> torch.Tensor | None:
        """The bias of the expert's output [out], a view; None if it has none."""
        bias = getattr(self, f"{DOWN}_bias", None)
        return None if bias is None else bias.data[number]

    def scales(self) -> bool:
        """Whether the last half of what `into` makes only multiplies: twice that half is twice the input of the last linear.
        The module's own code says it, on random numbers."""
        fused: Any = self._fused
        if self.scattered:
            return True
        if not fused.has_gate or hasattr(self, f"{self.first}_bias"):
            return False
        up = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
        twice = torch.cat([up[:, :8], 2 * up[:, 8:]], -1)
        with torch.no_grad():
            return torch.allclose(fused._apply_gate(twice), 2 * fused._apply_gate(up))

    @contextmanager
    def ready(self, number: int) -> Iterator[None]:
        """Inside, one expert has its weights."""
        with self.fill(self.linears(number).values()):
            yield

    def forward(self, *given: torch.Tensor) -> torch.Tensor:
        """hidden [tokens, in], index and weights [tokens, chosen experts] -> [tokens, out]; Llama 4's form as it is."""
        if not self.scattered:
            return self.routed(*given)  # type: ignore[no-any-return]
        rows = given[0].view(self.count, -1, given[0].shape[-1])
        used = rows.abs().sum(-1) > 0  # [experts, tokens]
        if int(used.sum(0).max()) > 1:
            raise UserError("a token of this model is sent to several experts, each with another input",
                            "llmc knows this form of experts with one expert a token: please report the model")
        index = used.int().argmax(0)[:, None]
        tokens = torch.arange(rows.shape[1], device=index.device)
        out = torch.zeros_like(rows)
        out[index[:, 0], tokens] = self.routed(rows[index[:, 0], tokens], index, torch.ones_like(index, dtype=torch.float32))
        return out.view(given[0].shape)


class Routed(nn.Module):
    """Runs experts on the tokens that the router sends to them. It is a module of its own, so that a pass can run something
    else in its place."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        object.__setattr__(self, "experts", experts)  # its parent

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """hidden [tokens, in], index and weights [tokens, chosen experts] -> [tokens, out]."""
        experts: Any = self.experts
        out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        for number in index.unique().tolist():
            if number < experts.count:  # transformers marks what is left out by the number after the last
                rows, slots = torch.where(index == number)
                with experts.ready(number):
                    y = experts.outer(number, experts.inner(number, hidden[rows]))
                out.index_add_(0, rows, y.float() * weights[rows, slots, None].float())
        return out.to(hidden.dtype)


def unfuse(model: nn.Module, leaves: Callable[[str], tuple[str, ...]]) -> dict[str, Experts]:
    """Replace every fused module of a model by `Experts`. leaves: from the name of a stacked parameter to the names of its
    linears in one expert. Returns {name in the model: module}."""
    found: dict[str, Experts] = {}
    for path, module in list(model.named_modules()):
        if is_fused(module):
            names = [n for n, p in module.named_parameters(recurse=False) if p.ndim == 3]
            experts = Experts(module, {name: leaves(f"{path}.{name}") for name in names})
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, experts)
            found[path] = experts
    return found


def _shape(fused: Any, name: str) -> tuple[int, int]:
    """[out, in] of one expert's matrix."""
    a, b = fused.get_parameter(name).shape[1:]
    return (b, a) if is_transposed(fused) else (a, b)


def is_transposed(fused: Any) -> bool:
    """Whether the stacked matrices of a fused module are [experts, in, out]."""
    return _is_scattered(fused) or bool(fused.is_transposed)


class _Unset(nn.Linear):
    """A linear whose weight is set later."""

    def reset_parameters(self) -> None:
        """Does nothing: 18,000 of them would take seconds."""


def _empty(rows: int, width: int) -> nn.Linear:
    return _Unset(width, rows, bias=False, device="meta", dtype=torch.float32)
