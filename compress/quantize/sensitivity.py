"""How much of the model's KL divergence each matrix is answerable for, measured.

Malinovskii et al., "Pushing the Limits of Large Language Model Quantization via the Linearity Theorem", 2024
(arXiv:2411.17525), theorem 1: for small errors the loss is a sum over the matrices,

    KL divergence  ~  sum_l  a_l t_l^2,      t_l^2 = |Q(W_l) - W_l|^2 / |W_l|^2

a_l is measured as there (section 4.1): Gaussian noise of a known t_l^2 is added to one matrix and the divergence of the
model's next-token distributions from the unchanged model's is taken. The noise is scaled by the size of each 32 weights of
a row, as rounding errors are. t_l^2 of a type is measured on some rows of the matrix, rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from llmc.compress.quantize.assignment import type_called
from llmc.compress.skeleton import get_weight, replaced, returning
from llmc.compress.teaching.loss import divergence
from llmc.formats.types import BLOCK_TYPES
from llmc.rounding.rtn import rtn

NOISE = 0.01  # t^2 of the probe: between those of 3 and 4 bits
RUN = 32  # weights of a row that share the size of their noise
SAMPLED = 1 << 14  # weights of a matrix that are rounded to learn a type's t^2


class Probe:
    """A model in memory and what it says about `ids` int64 [sequences, length] while it is unchanged.

    layers: the name of its list of decoder layers. Every layer's output is kept, so that a change in layer i runs only
    the layers from i on.
    """

    def __init__(self, model: nn.Module, layers: str, ids: torch.Tensor) -> None:
        self.model, self.layers, self.ids = model, layers, ids
        self.count = len(model.get_submodule(layers))  # type: ignore[arg-type]
        self.outputs: list[list[Any]] = []
        self.logits: list[torch.Tensor] = []
        for row in ids:
            with self._recording() as outputs:
                self.logits.append(self._run(row))
            self.outputs.append(outputs)

    def divergence(self, first: int) -> float:
        """Mean KL divergence (nats a token) of the model as it is now, changed from layer `first` on; `count`: in what
        follows the layers, 0: anywhere."""
        total = 0.0
        for row, outputs, before in zip(self.ids, self.outputs, self.logits, strict=True):
            known = {f"{self.layers}.{i}": returning(outputs[i]) for i in range(first)}
            with replaced(self.model, known):
                total += float(divergence(self._run(row), before))
        return total / self.ids.numel()

    def sensitivity(self, module: nn.Module, first: int, generator: torch.Generator) -> float:
        """a_l of the weight of `module`, a linear or an embedding, which is left as it was."""
        weight = module.weight.data if isinstance(module, nn.Embedding) else get_weight(module)
        before = weight.clone()
        noise = torch.randn(weight.shape, generator=generator).to(weight.device)
        noise *= sizes(before)
        noise *= (NOISE * before.square().sum() / noise.square().sum()).sqrt()
        try:
            weight.add_(noise)
            return self.divergence(first) / NOISE
        finally:
            weight.copy_(before)

    @torch.no_grad()
    def _run(self, row: torch.Tensor) -> torch.Tensor:
        """Logits [length, vocab] of one sequence."""
        ids = row[None].to(next(self.model.parameters()).device)
        logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits[0]

    @contextmanager
    def _recording(self) -> Iterator[list[Any]]:
        outputs: list[Any] = []
        handles = [layer.register_forward_hook(lambda _m, _args, out: outputs.append(out))
                   for layer in self.model.get_submodule(self.layers).children()]
        try:
            yield outputs
        finally:
            for handle in handles:
                handle.remove()


def sizes(weight: torch.Tensor) -> torch.Tensor:
    """The root mean square of each RUN weights of a row (of the whole row where RUN does not divide it), at each weight."""
    run = RUN if weight.shape[1] % RUN == 0 else weight.shape[1]
    by_run = weight.float().unflatten(1, (-1, run)).square().mean(-1).sqrt()
    return by_run.repeat_interleave(run, 1)


def errors(weight: torch.Tensor, types: list[str]) -> dict[str, float]:
    """t^2 of `weight` [out, in] on each type, from rows evenly spaced over all."""
    rows = max(1, min(weight.shape[0], SAMPLED // weight.shape[1]))
    sample = weight[torch.arange(rows) * weight.shape[0] // rows].float()
    energy = float(sample.square().sum())
    return {name: float((rtn(sample, type_called(name)).dequantize() - sample).square().sum()) / energy if energy else 0.0
            for name in types}


def candidates(width: int) -> list[str]:
    """The types that rows of `width` weights can have."""
    return [name for name, qtype in BLOCK_TYPES.items() if width % qtype.block == 0]
