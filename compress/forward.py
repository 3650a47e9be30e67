"""The KL divergence of a rounded or pruned model from its base, computed layer by layer.

The memory holds one layer, the states of the held-out sequences and a part of the logits."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmc.compress.calibration import sequences_at_once, walk
from llmc.compress.ends import is_tied, name_of, stored_head
from llmc.compress.entering import Outputs, enter
from llmc.compress.rows import Carried, Rows
from llmc.compress.skeleton import Skeleton
from llmc.compress.states import batches_of
from llmc.compress.teaching.loss import CHUNK_BYTES, divergence
from llmc.compress.tracing import states_of
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.linears import get_weight, set_weight
from llmc.formats.types import AnyType
from llmc.rounding.rtn import rtn


@dataclass
class Run:
    """A model that has been run. states: float32 [n, seq_len, hidden], the output of its last layer; [n, streams, seq_len,
    hidden] if the model has several streams.  axis: of the sequences in the states that a layer takes.  outputs: what its
    layers return."""

    skeleton: Skeleton
    states: torch.Tensor
    axis: int
    outputs: Outputs


@torch.no_grad()
def run(folder: Path, sequences: torch.Tensor, device: str, type_of: Callable[[int], AnyType] | None, what: str,
        layers: list[int] | None = None) -> Run:
    """Run int64 sequences [n, seq_len] through the model of a float folder.

    type_of: from the width of a row to the type that linears are rounded to nearest in; None leaves them unchanged.
    what: the model's name for the progress line.  layers: the layers to run; None runs all.
    All in float32: the measured difference may be smaller than the rounding error of bf16.
    """
    skeleton = Skeleton(Checkpoint.open(folder), device)
    batch, count = sequences_at_once(skeleton, sequences.shape[1]), len(sequences)
    with tempfile.TemporaryDirectory(prefix="llmc-") as name:
        given, carried = Rows(Path(name), "given", count), Carried(Path(name), "carried", count)
        entered = enter(skeleton, iter(sequences.split(batch)), sequences.shape[1], given)
        states = torch.cat([part.movedim(entered.axis, 0) for part in entered.states])
        ran = Run(skeleton, states, entered.axis, entered.outputs)

        def visit(index: int, layer: nn.Module) -> str:
            if type_of is not None:
                for linear in skeleton.linears(index).values():
                    weight = get_weight(linear)
                    set_weight(linear, rtn(weight, type_of(weight.shape[1])).dequantize())
            for first, last in batches_of(count, batch):  # each batch is replaced by the layer's output
                call = entered.layers[index].call(first, last, carried)
                out = layer(states[first:last].movedim(0, ran.axis), **call.kwargs)
                states[first:last] = states_of(out).movedim(ran.axis, 0)
                call.carry(out)
            return ""

        walk(skeleton, range(len(skeleton.layers)) if layers is None else layers, f"measuring {what}, layer", visit)
    return ran


@contextmanager
def head_of(ran: Run) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """Inside, a function from output states of the last layer (as in Run) to logits [n, width, vocab]. It runs the
    model itself (last norm, head, soft caps) with layers that return the given states."""
    skeleton, model = ran.skeleton, ran.skeleton.model
    head, forwards = model.get_output_embeddings(), [layer.forward for layer in skeleton.layers]
    given: list[torch.Tensor] = []
    for part, name in skeleton.outside():
        skeleton.load(part, name)
    weight = (model.get_input_embeddings().weight.data if is_tied(skeleton)
              else skeleton.checkpoint.tensor(stored_head(skeleton)).to(skeleton.device))
    head._parameters["weight"] = nn.Parameter(weight.float(), requires_grad=False)
    if getattr(head, "bias", None) is not None:
        bias = skeleton.names.stored(name_of(skeleton, head).removesuffix("weight") + "bias")
        head._parameters["bias"] = nn.Parameter(skeleton.checkpoint.tensor(bias).to(skeleton.device).float(), False)

    def through(*_args: Any, **_kwargs: Any) -> Any:
        return ran.outputs.of(given[-1])

    def logits(states: torch.Tensor) -> torch.Tensor:
        given.append(states.movedim(0, ran.axis))
        ids = torch.zeros(states.shape[0], states.shape[-2], dtype=torch.int64, device=skeleton.device)
        found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
        given.clear()
        return found

    try:
        for layer in skeleton.layers:
            layer.forward = through  # type: ignore[method-assign]
        yield logits
    finally:
        for layer, forward in zip(skeleton.layers, forwards, strict=True):
            layer.forward = forward  # type: ignore[method-assign]
        skeleton.free(head)
        skeleton.leave()


@torch.no_grad()
def kld(base: Run, other: Run) -> list[float]:
    """Mean KL(base || other) over the positions of each sequence, nats."""
    width = base.states.shape[-2]
    vocab = base.skeleton.model.get_output_embeddings().weight.shape[0]
    rows = max(1, CHUNK_BYTES // (vocab * 4))
    found = []
    with head_of(base) as base_head, head_of(other) as head:
        for states, base_states in zip(other.states, base.states, strict=True):
            total = 0.0
            for part, base_part in zip(states.split(rows, -2), base_states.split(rows, -2), strict=True):
                total += float(divergence(head(part[None])[0], base_head(base_part[None])[0]))
            found.append(total / width)
    return found
