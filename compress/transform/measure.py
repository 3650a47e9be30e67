"""What rounding costs a float folder: the divergence of the rounded model from the unchanged base, layer by layer in memory
that one layer, the states of the held-out sequences and a piece of the logits fill."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from llmc.checkpoint import Checkpoint
from llmc.compress.calibration import sequences_at_once
from llmc.compress.heal.loss import CHUNK_BYTES, divergence
from llmc.compress.quantize.config import AnyGrid
from llmc.compress.quantize.rtn import rtn
from llmc.compress.skeleton import Skeleton, get_weight, set_weight
from llmc.console import progress


@dataclass
class Run:
    """A model that has been run. states: float32 [n, seq_len, hidden], what leaves its last layer."""

    skeleton: Skeleton
    states: torch.Tensor
    tuples: bool


@torch.no_grad()
def run(folder: Path, sequences: torch.Tensor, device: str, grid_of: Callable[[int], AnyGrid] | None, what: str) -> Run:
    """Run int64 sequences [n, seq_len] through a float folder, its linears rounded to nearest where grid_of says how.

    All in float32: what is measured may be smaller than bf16's own rounding.
    """
    skeleton = Skeleton(Checkpoint.open(folder), device)
    batch = sequences_at_once(skeleton, sequences.shape[1])
    arguments, entering = skeleton.enter(iter(sequences.split(batch)), sequences.shape[1])
    states = torch.cat(list(entering))
    tuples = False
    with progress(f"measuring {what}, layer", len(skeleton.layers)) as p:
        for index in range(len(skeleton.layers)):
            with skeleton.layer(index) as layer:
                for linear in skeleton.linears(index).values() if grid_of else ():
                    weight = get_weight(linear)
                    set_weight(linear, rtn(weight, grid_of(weight.shape[1])).dequantize())
                for part in states.split(batch):  # views: each batch is replaced by what leaves the layer
                    out = layer(part, **arguments[index])
                    tuples = isinstance(out, tuple)
                    part.copy_(out[0] if isinstance(out, tuple) else out)
            p.step()
    return Run(skeleton, states, tuples)


@torch.no_grad()
def kld(base: Run, other: Run) -> list[float]:
    """Mean KL(base || other) over the positions of each sequence, nats."""
    width, hidden = base.states.shape[1:]
    vocab = base.skeleton.model.get_output_embeddings().weight.shape[0]
    rows = max(1, CHUNK_BYTES // (vocab * 4))
    found = []
    with base.skeleton.after_layers(base.tuples) as base_head, other.skeleton.after_layers(other.tuples) as head:
        for ours, theirs in zip(other.states, base.states, strict=True):
            total = 0.0
            for mine, aim in zip(ours.split(rows), theirs.split(rows), strict=True):
                total += float(divergence(head(mine.view(1, -1, hidden))[0], base_head(aim.view(1, -1, hidden))[0]))
            found.append(total / width)
    return found
