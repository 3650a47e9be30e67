"""A quantised model whose scales can be trained: linears that hold codes, and multiply them out on each use.

A weight is  scale[group] * level  with `level` the code less its zero point. The level stays; the scale is
s0 * exp(p), rounded to the fp16 that files hold with the gradient passed straight through (Bengio et al., 2013,
arXiv:1308.3432), and p is what is trained: a relative step means the same for every group.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmc.checkpoint import Checkpoint
from llmc.compress.skeleton import get_weight, is_linear
from llmc.errors import UserError
from llmc.export.gptq import checkpoint as gptq_format
from llmc.grids import QuantizedTensor
from llmc.runtimes.torch_model import load_torch_model


class _Product(torch.autograd.Function):
    """x W^T with W = levels * scale, made again for the backward pass and never kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, levels: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, levels, scale)
        return x @ expand(levels, scale, x.dtype).t()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:
        x, levels, scale = ctx.saved_tensors
        dy = grads[0].to(x.dtype)
        dx = dy @ expand(levels, scale, x.dtype)
        dw = dy.reshape(-1, dy.shape[-1]).t() @ x.reshape(-1, x.shape[-1])  # [out, in]
        per_group = dw.mul_(levels.to(dw.dtype)).view(*scale.shape, -1).sum(-1, dtype=scale.dtype)
        return dx, None, per_group


def expand(levels: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """levels [out, in], scale [out, groups] -> the weight [out, in]. (Cast first: products of unequal types are slow.)"""
    return levels.to(dtype).view(*scale.shape, -1).mul_(scale.to(dtype).unsqueeze(-1)).view(levels.shape)


class HealedLinear(nn.Module):
    """Stands where a linear was. shift: float32 [out, groups], the logarithm of what the scales are multiplied with."""

    levels: torch.Tensor
    start: torch.Tensor

    def __init__(self, q: QuantizedTensor, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__()
        zero = q.grid.zero if q.zeros is None else q.zeros.repeat_interleave(q.grid.group_size, 1).to(torch.int16)
        levels = q.codes.to(torch.int16) - zero
        self.register_buffer("levels", levels.to(torch.int8) if q.grid.bits == 4 else levels)
        self.register_buffer("start", q.scales.float())
        self.shift = nn.Parameter(torch.zeros_like(self.start))
        self.bias, self.dtype = bias, dtype

    def scale(self) -> torch.Tensor:
        """float32 [out, groups], exactly values of fp16."""
        moved = self.start * self.shift.exp()
        return moved + (moved.detach().clamp(-65504, 65504).half().float() - moved.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = _Product.apply(x.to(self.dtype), self.levels, self.scale())
        return y if self.bias is None else y + self.bias.to(y.dtype)


def load_student(folder: Path, dtype: torch.dtype) -> tuple[Any, dict[str, HealedLinear]]:
    """The model of a GPTQ folder, everything frozen but the scales, and its linears by their names in the checkpoint.

    dtype: of the products; norms and the residual stream stay float32.
    """
    checkpoint = Checkpoint.open(folder)
    if checkpoint.quantization is None:
        raise UserError(f"{folder} is a float model: there is nothing to heal", "run `llmc quantize` on it first")
    grid = gptq_format.grid_of(checkpoint)
    model = load_torch_model(folder).requires_grad_(False)
    prefix = model.base_model_prefix + "."
    modules = dict(model.named_modules())
    healed = {}
    for name in gptq_format.quantized_linears(checkpoint):
        path = next(p for p in (name, name.removeprefix(prefix), prefix + name) if p in modules)
        linear = modules[path]
        q = gptq_format.read(checkpoint, name, grid)
        assert get_weight(linear).shape == q.shape
        healed[name] = HealedLinear(q, getattr(linear, "bias", None), dtype)
        model.set_submodule(path, healed[name])
    return model, healed


def load_teacher(folder: Path, dtype: torch.dtype) -> Any:
    """The float model, frozen. Only the linears of its body are `dtype`: as in the student, all else is float32."""
    model = load_torch_model(folder).requires_grad_(False)
    for module in getattr(model, model.base_model_prefix).modules():
        if is_linear(module):
            module.to(dtype)
    return model


def norm_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of norms: vectors of the width of the stream, outside linears and embeddings."""
    return {f"{path}.{name}".strip("."): p for path, m in model.named_modules()
            if not isinstance(m, HealedLinear | nn.Embedding) and not is_linear(m)
            for name, p in m.named_parameters(recurse=False) if name == "weight" and p.dim() == 1}


def hidden_states(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """What the head reads: [n, seq_len, hidden], after the last norm."""
    states: torch.Tensor = getattr(model, model.base_model_prefix)(input_ids=ids, use_cache=False).last_hidden_state
    return states


@contextmanager
def head_of(model: Any) -> Iterator[Any]:
    """Inside, a function from hidden states [1, n, hidden] to logits [n, vocab], with whatever the architecture does
    there (soft caps, scalings): the model itself, whose body hands the given states through."""
    from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

    body = getattr(model, model.base_model_prefix)
    forward = body.forward
    given: list[torch.Tensor] = []
    body.forward = lambda *_args, **_kwargs: BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=given[-1])
    nothing = torch.zeros(1, 1, dtype=torch.int64, device=next(model.parameters()).device)

    def head(states: torch.Tensor) -> torch.Tensor:
        given.append(states)
        try:
            logits: torch.Tensor = model(input_ids=nothing, use_cache=False).logits[0]
        finally:
            given.pop()
        return logits

    try:
        yield head
    finally:
        body.forward = forward
