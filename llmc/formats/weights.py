"""Fills the modules of a model without weights from its checkpoint, a part at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from llmc.errors import UserError
from llmc.formats import quantized
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.linears import is_linear
from llmc.formats.mixture import Experts, unfuse
from llmc.formats.names import Names, missing


class Weights:
    """The weights of one model on the meta device (see hf.empty_model).

    names: the mapping to the files.  values: asked first for every parameter, by its name and module: returns its value, or
    None for the stored one.  tied: as in Names.
    """

    def __init__(self, checkpoint: Checkpoint, model: Any, device: str | torch.device = "cpu",
                 values: Callable[[str, nn.Module], torch.Tensor | None] | None = None,
                 tied: dict[str, str] | None = None) -> None:
        self.checkpoint, self.model, self.device = checkpoint, model, torch.device(device)
        self.names = Names.of(checkpoint, model, quantized.linears(checkpoint), tied)
        self.values = values
        # called with each linear of an expert after it is filled
        self.on_fill: Callable[[nn.Module], None] = lambda _linear: None
        self._casting: set[int] = set()  # ids of embeddings whose output is cast
        # id of an expert's linear -> (its name, whether the model transposes it)
        self._lazy: dict[int, tuple[str, bool]] = {}

    def unfuse(self, part: nn.Module, prefix: str) -> dict[str, Experts]:
        """Replace stacked experts in a part of the model by linears, which are filled when their expert runs. Returns
        {name in the part: module}."""
        found = unfuse(part, lambda name: self.names.leaves(f"{prefix}.{name}"))
        for path, experts in found.items():
            for number in range(experts.count):
                for name, linear in experts.linears(number).items():
                    self._lazy[id(linear)] = f"{prefix}.{path}.{name}", experts.transposed
            experts.fill = self.filled
        return found

    def load(self, module: nn.Module, prefix: str, children: bool = True) -> None:
        """Fill a module's parameters and persistent buffers, in float32. Linears of experts are left to `filled`.

        children: of the modules in it too.

        Embeddings keep their stored dtype, because they can be gigabytes; a hook casts their output to float32. UserError if
        a tensor is missing or has another shape than in config.json.
        """
        for path, sub in module.named_modules() if children else [("", module)]:
            if id(sub) in self._lazy:
                continue
            here = f"{prefix}.{path}".strip(".")
            embedding = isinstance(sub, nn.Embedding)
            for name in [*dict(sub.named_parameters(recurse=False)), *dict(sub.named_buffers(recurse=False))]:
                full = f"{here}.{name}".strip(".")
                value = self._value(full, sub)
                if name in sub._buffers:  # what is not stored was computed when the module was built
                    sub._buffers[name] = self._cast(sub._buffers[name] if value is None else value, embedding)
                    continue
                if value is None:
                    raise missing(self.checkpoint.folder, full)
                self._put(sub, name, full, self._cast(value, embedding))
            if embedding and id(sub) not in self._casting:
                self._casting.add(id(sub))
                sub.register_forward_hook(lambda _m, _args, out: out.float())

    @contextmanager
    def filled(self, linears: Iterable[nn.Module]) -> Iterator[None]:
        """Inside, these linears have their weights. Linears of experts are filled here and freed at the end; others have
        theirs as long as their layer is loaded."""
        empty = [m for m in linears if id(m) in self._lazy and m.get_parameter("weight").device.type == "meta"]
        try:
            for linear in empty:
                name, transposed = self._lazy[id(linear)]
                place, value = self.names.locate(f"{name}.weight"), None
                if self.values is None or (value := self.values(f"{name}.weight", linear)) is None:
                    value = self._value(f"{name}.weight", linear)
                    if value is not None and place is not None and place.expert is not None and transposed:
                        value = value.t()
                if value is None:
                    raise missing(self.checkpoint.folder, f"{name}.weight")
                self._put(linear, "weight", f"{name}.weight", self._cast(value).contiguous())
                self.on_fill(linear)
            yield
        finally:
            for linear in empty:
                self.free(linear)

    @staticmethod
    def free(module: nn.Module) -> None:
        """Move a module's parameters back to the meta device."""
        for sub in module.modules():
            for name, p in sub._parameters.items():
                if p is not None and p.device.type != "meta":
                    sub._parameters[name] = nn.Parameter(p.data.to("meta"), requires_grad=False)

    def dtype(self, parameter: str) -> torch.dtype:
        """The stored dtype of a float parameter."""
        place = self.names.locate(parameter)
        if place is None:
            raise missing(self.checkpoint.folder, parameter)
        return self.checkpoint.empty(place.name).dtype

    def pack(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of the files that hold these parameters. values: {parameter: value}; of a stacked tensor all experts,
        each [out, in]."""
        stacks: dict[str, dict[int, torch.Tensor]] = {}
        found = {}
        for parameter, value in values.items():
            place = self.names.locate(parameter)
            assert place is not None, parameter
            if place.expert is None:
                found[place.name] = value
                continue
            module: Any = self.model.get_submodule(parameter.rsplit(".", 3)[0])
            stacks.setdefault(place.name, {})[place.expert] = value.t() if module.transposed else value
        self.names.replaced(values)  # all experts of a stack are there
        return found | {name: torch.stack([stack[i] for i in range(len(stack))]) for name, stack in stacks.items()}

    def _value(self, name: str, module: nn.Module) -> torch.Tensor | None:
        """The value of a parameter or buffer; None if the files lack it."""
        if self.values is not None and (given := self.values(name, module)) is not None:
            return given
        if (value := self.names.read(name)) is not None:
            return value
        place = self.names.locate(name)
        if place is None:
            return None
        w = quantized.read(self.checkpoint, place.name).dequantize()
        return w if isinstance(module, nn.Linear) or not is_linear(module) else w.t().contiguous()

    def _cast(self, value: Any, embedding: bool = False) -> torch.Tensor:
        assert isinstance(value, torch.Tensor)
        return value.to(self.device, torch.float32 if value.is_floating_point() and not embedding else value.dtype)

    def _put(self, module: nn.Module, name: str, full: str, value: torch.Tensor) -> None:
        expected = module._parameters[name]
        if expected is not None and expected.shape != value.shape:
            place = self.names.locate(full)
            raise UserError(f"{place.name if place else full} has shape {list(value.shape)}, config.json says "
                            f"{list(expected.shape)}", "the checkpoint and its config.json do not belong together")
        module._parameters[name] = nn.Parameter(value, requires_grad=False)


class NoMeta(TorchDispatchMode):
    """Inside, an operation on a tensor without values is an error. (On the CPU some operations return what is in memory.)"""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flat = [*args, *kwargs.values()]
        if any(isinstance(a, torch.Tensor) and a.device.type == "meta" for a in flat):
            raise RuntimeError(f"{func} was given a weight that has no values")
        return func(*args, **kwargs)
