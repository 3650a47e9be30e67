"""Each matrix's share of the model's KL divergence (its sensitivity), measured.

Malinovskii et al., "Pushing the Limits of Large Language Model Quantization via the Linearity Theorem", 2024
(arXiv:2411.17525), theorem 1: for small errors the loss is a sum over the matrices,

    KL divergence  ~  sum_l  a_l t_l^2,      t_l^2 = |Q(W_l) - W_l|^2 / |W_l|^2

a_l is measured as in section 4.1: add Gaussian noise of a known t_l^2 to one matrix, and take the KL divergence of the
model's next-token distributions from those of the unchanged model. As in rounding errors, the size of the noise follows the
size of each 32 weights of a row. t_l^2 of a type is measured on some rows of the matrix, rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from llmc.compress.quantize.assignment import type_called
from llmc.compress.teaching.loss import divergence
from llmc.compress.tracing import Replay, recorded, replaced
from llmc.formats.types import BLOCK_TYPES
from llmc.rounding.rtn import rtn

NOISE = 0.01  # t^2 of the noise: between those of 3 and 4 bits
RUN = 32  # weights of a row that share the size of their noise
SAMPLED = 1 << 14  # weights of a matrix that are rounded to measure a type's t^2


class Probe:
    """A model in memory, with its unchanged logits on `ids` int64 [sequences, length].

    layers: the name of its list of decoder layers. Every layer's output is stored, so that after a change in layer i only the
    layers from i on run again.
    """

    def __init__(self, model: nn.Module, layers: str, ids: torch.Tensor) -> None:
        self.model, self.layers, self.ids = model, layers, ids
        self.count = len(model.get_submodule(layers))  # type: ignore[arg-type]
        self.outputs: list[list[Replay]] = []
        self.logits: list[torch.Tensor] = []
        for row in ids:
            with recorded(model.get_submodule(layers)) as outputs:
                self.logits.append(self._run(row))
            self.outputs.append(outputs)

    def divergence(self, first: int) -> float:
        """Mean KL divergence (nats per token) of the present model from the unchanged one. first: the first layer that can
        differ; 0 if anything can, `count` if only the part after the layers can."""
        total = 0.0
        for row, outputs, before in zip(self.ids, self.outputs, self.logits, strict=True):
            known = {f"{self.layers}.{i}": outputs[i] for i in range(first)}
            with replaced(self.model, known):
                total += float(divergence(self._run(row), before))
        return total / self.ids.numel()

    def sensitivity(self, weights: list[torch.Tensor], first: int, generator: torch.Generator) -> float:
        """a_l of a matrix of the model, or of several (those of all experts), which have one t_l. They are restored
        afterwards."""
        before = [w.clone() for w in weights]
        noise = [torch.randn(w.shape, generator=generator).to(w.device) * sizes(w) for w in before]
        energy, power = (sum(float(t.square().sum()) for t in some) for some in (before, noise))
        by = (NOISE * energy / power) ** 0.5 if power else 0.0
        try:
            for w, n in zip(weights, noise, strict=True):
                w.add_(n, alpha=by)
            return self.divergence(first) / NOISE
        finally:
            for w, old in zip(weights, before, strict=True):
                w.copy_(old)

    @torch.no_grad()
    def _run(self, row: torch.Tensor) -> torch.Tensor:
        """Logits [length, vocab] of one sequence."""
        ids = row[None].to(next(self.model.parameters()).device)
        logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits[0]


def sizes(weight: torch.Tensor) -> torch.Tensor:
    """In the shape of `weight`: the root mean square of the RUN weights of a row to which each weight belongs (of the whole
    row if RUN does not divide it)."""
    run = RUN if weight.shape[1] % RUN == 0 else weight.shape[1]
    by_run = weight.float().unflatten(1, (-1, run)).square().mean(-1).sqrt()
    return by_run.repeat_interleave(run, 1)


def errors(weights: list[torch.Tensor], types: list[str]) -> dict[str, float]:
    """{type: t^2 of these matrices [out, in] together}, measured on rows that are evenly spaced over all."""
    count, width = sum(len(w) for w in weights), weights[0].shape[1]
    rows = max(1, min(count, SAMPLED // width))
    wanted, parts, start = torch.arange(rows) * count // rows, [], 0
    for w in weights:
        parts.append(w[(wanted[(wanted >= start) & (wanted < start + len(w))] - start).to(w.device)].float().cpu())
        start += len(w)
    sample = torch.cat(parts)
    energy = float(sample.square().sum())
    return {name: float((rtn(sample, type_called(name)).dequantize() - sample).square().sum()) / energy if energy else 0.0
            for name in types}


def candidates(width: int, named: Collection[str] = ()) -> list[str]:
    """The types that rows of `width` weights can have: those of two bits or more. With less, errors are no longer small, and
    the sum above is not what they lose. Types with codebooks only if they are named: what GPTQ gains on them was not
    measured, they take long to round, and they are slow on many devices."""
    return [name for name, qtype in BLOCK_TYPES.items() if width % qtype.block == 0 and qtype.bits_per_weight >= 2
            and (qtype.codebook is None or name in named)]
