"""A quantized model whose factors can be trained: its linears hold codes and dequantize them once per optimizer step.

A weight is  d * integer * level + m * integer.  `level` is the value of its code. `d` and `m` are the fp16 factors of its
block. The integers belong to its group in blocks of 256 (elsewhere they are 1). Types without a minimum have no second term.
Codes, levels and integers do not change.

Each factor is f0 * exp(p), and p is trained. The factor is rounded to fp16, as in the file, with a straight-through gradient
(Bengio et al., 2013, arXiv:1308.3432). A step of p is thus a relative step of the same size for every block, and its gradient
needs only the block's weights. With a minimum there are two p: one scales both factors together, so that the weights grow;
the other scales the minimum alone, in steps of about one level. Two independent p for d and m would work against each other,
and the mean of a block would jump.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmc.compress.teaching.models import cast_head, checkpoint_layers
from llmc.formats import quantized
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.hf import load_torch_model
from llmc.formats.linears import get_weight, is_linear
from llmc.formats.mixture import unfuse
from llmc.formats.names import Names
from llmc.formats.quantized import Quantized
from llmc.formats.types import BlockTensor, BlockType
from llmc.rounding.block_factors import stored


class _Product(torch.autograd.Function):
    """x W^T, with the gradients of x, shift and lift.

    x [..., in]; weight [out, in]; shift, lift [out, blocks]; low [out, groups]: the second term of each group's weights.
    shift scales all weights of a block by e^shift, so dL/dshift is the block's sum of dL/dW * W. lift scales the second term
    alone, by e^(reach * lift).
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, shift: torch.Tensor, lift: torch.Tensor | None,
                low: torch.Tensor | None, reach: float) -> torch.Tensor:
        ctx.save_for_backward(x, weight, low)
        ctx.shape, ctx.reach = shift.shape, reach
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, low = ctx.saved_tensors
        dy = grads[0].to(x.dtype)
        dx = dy @ weight
        turned = dy.reshape(-1, dy.shape[-1]).t()
        if weight.shape[0] < weight.shape[1]:
            turned = turned.contiguous()  # faster if it is the smaller factor (576 x 1536: 3.5 ms instead of 5.8 ms)
        dw = turned @ x.reshape(-1, x.shape[-1])  # [out, in]
        dlift = None
        if low is not None:
            dlift = ctx.reach * (dw.view(*low.shape, -1).sum(-1).float() * low).view(*ctx.shape, -1).sum(-1)
        dshift = dw.mul_(weight).view(*ctx.shape, -1).sum(-1).float()
        return dx, None, dshift, dlift, None, None


def expand(levels: torch.Tensor, scale: torch.Tensor, low: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """levels [out, in], scale and low [out, groups] -> the weight [out, in] in `dtype`. It casts first, because products of
    unequal dtypes are slow."""
    weight = levels.to(dtype).view(*scale.shape, -1).mul_(scale.to(dtype).unsqueeze(-1))
    if low is not None:
        weight += low.to(dtype).unsqueeze(-1)
    return weight.view(levels.shape)


class HealedLinear(nn.Module):
    """Replaces a linear. shift, lift: the trained parameters, float32 [out, blocks]. The factors are d * e^shift and
    m * e^(shift + reach * lift), where `reach` is about one level. lift is None if the type has no minimum."""

    levels: torch.Tensor
    d: torch.Tensor
    m: torch.Tensor | None
    scales: torch.Tensor | None
    mins: torch.Tensor | None

    def __init__(self, q: Quantized, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__()
        levels, self.qtype = levels_of(q), q.type
        self.register_buffer("levels", levels.to(torch.int8) if int(levels.abs().max()) < 128 else levels)
        blocks = isinstance(q, BlockTensor)
        self.names = ("d", "m") if blocks else ("scales", "zeros")  # the names of the factors in q
        self.register_buffer("d", (q.d if isinstance(q, BlockTensor) else q.scales).float())
        self.register_buffer("m", q.m.float() if isinstance(q, BlockTensor) and q.m is not None else None)
        self.register_buffer("scales", q.scales.float() * q.type.unit if isinstance(q, BlockTensor) and q.scales is not None
                             else None)
        self.register_buffer("mins", -q.mins.float() if isinstance(q, BlockTensor) and q.mins is not None else None)
        self.shift = nn.Parameter(torch.zeros_like(self.d))
        self.lift = None if self.m is None else nn.Parameter(torch.zeros_like(self.m))
        self.reach = 2 / float(levels.abs().max())
        self.bias, self.dtype = bias, dtype
        self._made: tuple[torch.Tensor, torch.Tensor | None] | None = None
        self._changes: list[int] = []

    @torch.no_grad()
    def factors(self) -> dict[str, torch.Tensor]:
        """The factors by their names in the quantized tensor: float32 [out, blocks], rounded to what the file holds."""
        d = self.d * self.shift.exp()
        found = {self.names[0]: stored(d, self.qtype) if isinstance(self.qtype, BlockType) else _stored(d)}
        if self.m is not None and self.lift is not None:
            found[self.names[1]] = _stored(self.m * (self.shift + self.reach * self.lift).exp())
        return found

    def trained(self) -> dict[str, nn.Parameter]:
        return {"shift": self.shift} if self.lift is None else {"shift": self.shift, "lift": self.lift}

    @torch.no_grad()
    def _multiply_out(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns (the weight in the dtype of the products, the second term). Both are cached until the parameters change."""
        changes = [p._version for p in self.trained().values()]
        if self._made is None or changes != self._changes:
            scale, *low = self.factors().values()
            wide = _times(low[0], self.mins) if low else None
            self._made = expand(self.levels, _times(scale, self.scales), wide, self.dtype), wide
            self._changes = changes
        return self._made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self._product(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @property
    def weight(self) -> torch.Tensor:
        """[out, in], for model code that multiplies with the weight itself (Mamba's dt_proj)."""
        return self._product(torch.eye(self.levels.shape[1], device=self.levels.device)).t()

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        weight, low = self._multiply_out()
        y: torch.Tensor = _Product.apply(x.to(self.dtype), weight, self.shift, self.lift, low, self.reach)
        return y


def levels_of(q: Quantized) -> torch.Tensor:
    """int16 [out, in]: the values of the codes, before any factor."""
    if isinstance(q, BlockTensor):
        return torch.tensor(q.type.levels, dtype=torch.int16)[q.codes.int()]
    zero = q.type.zero if q.zeros is None else q.zeros.repeat_interleave(q.type.group_size, 1).to(torch.int16)
    return q.codes.to(torch.int16) - zero


def _times(factor: torch.Tensor, integers: torch.Tensor | None) -> torch.Tensor:
    """factor [out, blocks] times the integers of the groups [out, groups]; the factor itself if integers is None."""
    if integers is None:
        return factor
    return (integers.view(*factor.shape, -1) * factor.unsqueeze(-1)).view(integers.shape)


def _stored(factor: torch.Tensor) -> torch.Tensor:
    """The factor rounded to fp16, in float32."""
    return factor.clamp(-65504, 65504).half().float()


def load_student(folder: Path, dtype: torch.dtype, checkpointing: bool = False) -> tuple[Any, dict[str, HealedLinear]]:
    """Returns (the model of a quantized folder, its healed linears by their names in the checkpoint). All parameters except
    the factors are frozen.

    dtype: of the products; norms and the residual stream are float32.
    """
    stored = Checkpoint.open(folder)
    model = load_torch_model(folder).requires_grad_(False)
    if checkpointing:
        checkpoint_layers(model)
    linears = quantized.linears(stored)
    names, healed = Names.of(stored, model, linears), {}
    unfuse(model, names.leaves)
    for name in linears:
        path = names.own(name)
        linear = model.get_submodule(path)
        q = quantized.read(stored, name)
        assert get_weight(linear).shape == q.shape
        healed[name] = HealedLinear(q, getattr(linear, "bias", None), dtype)
        model.set_submodule(path, healed[name])
    cast_head(model, dtype)
    return model, healed


def stored_tensors(folder: Checkpoint, linears: dict[str, HealedLinear]) -> dict[str, torch.Tensor]:
    """The tensors of healed linears, by their names in the checkpoint of the quantized model."""
    found: dict[str, torch.Tensor] = {}
    for name, linear in linears.items():
        q = quantized.read(folder, name)
        factors = {field: f.to("cpu", getattr(q, field).dtype) for field, f in linear.factors().items()
                   if getattr(q, field) is not None}
        healed = quantized.encode(quantized.with_tensors(q, factors))
        found |= {f"{name}.{part}": tensor.contiguous() for part, tensor in healed.items()}
    return found


def moved(linears: dict[str, HealedLinear]) -> float:
    """The mean relative change of the scales, averaged over linears."""
    return sum(float((m.shift.detach().exp() - 1).abs().mean()) for m in linears.values()) / len(linears)


def norm_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of norms: vectors outside linears and embeddings, by name."""
    return {f"{path}.{name}".strip("."): p for path, m in model.named_modules()
            if not isinstance(m, HealedLinear | nn.Embedding) and not is_linear(m)
            for name, p in m.named_parameters(recurse=False) if name == "weight" and p.dim() == 1}
