"""What pruning cost: perplexity, and divergence from the model before, on held-out sequences of the calibration text.

The figures are those of `llmc eval` (evals/quality/metrics.py), scored as its protocol does: the second half of every
sequence. Both models run layer by layer in float32, so the memory is that of one layer, the states and a piece of the logits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmc.compress import text
from llmc.compress.forward import Run, head_of, run
from llmc.compress.skeleton import Skeleton, linears_of
from llmc.evals.quality import metrics
from llmc.evals.quality.protocol import FolderTokenizer
from llmc.formats.checkpoint import Checkpoint

LOSES = 1.05  # times the perplexity before: from here on the result is said to need healing


def split(sequences: torch.Tensor, held_out: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(what pruning may look at, what judges it): `held_out` of the sequences [n, seq_len], evenly spaced over all."""
    n = sequences.shape[0]
    held = text.held_out(n, held_out)
    return sequences[sorted(set(range(n)) - set(held))], sequences[held]


@torch.no_grad()
def judge(source: Path, pruned: Path, sequences: torch.Tensor, name: str, device: str) -> dict[str, Any]:
    """The figures of metrics.summarise, each a value with its error, and how they were made.

    sequences: int64 [n, seq_len]. They begin as the tokenizer begins a text, because calibration text does.
    """
    tokenizer = FolderTokenizer(source)
    before = run(source, sequences, device, None, "the model before")
    after = run(pruned, sequences, device, None, "the pruned model")
    first = sequences.shape[1] // 2
    targets = sequences[:, first + 1 :].numpy()
    nll, base_nll, kld = (np.empty(targets.shape, np.float32) for _ in range(3))
    top1 = np.empty(targets.shape, bool)
    with head_of(before) as base_head, head_of(after) as head:
        for i, aims in enumerate(targets):
            wanted, got = (_logits(ran, to_logits, i, first) for ran, to_logits in ((before, base_head), (after, head)))
            nll[i], base_nll[i] = metrics.nll(got, aims), metrics.nll(wanted, aims)
            kld[i], top1[i] = metrics.divergence(wanted, got)
    scored = sum(len(tokenizer.decode(row).encode()) for row in targets)
    return {"text": f"{len(sequences)} sequences of {name} that pruning did not look at", "sequences": len(sequences),
            "seq_len": sequences.shape[1],
            "scored": f"tokens {first + 1} to {sequences.shape[1] - 1} of each (counted from 0)",
            "scored_tokens": int(targets.size), **metrics.summarise(nll, scored, kld, top1, base_nll)}


def _logits(ran: Run, to_logits: Any, i: int, first: int) -> np.ndarray:
    """float32 [scored, vocab]: those that predict the tokens after number `first` of sequence i."""
    states = ran.states[i : i + 1, first:-1].contiguous()
    found: torch.Tensor = to_logits(states)[0]
    return found.float().cpu().numpy()


def advice(figures: dict[str, Any], source: Path, out: Path) -> str:
    """One plain sentence."""
    ratio, kld = figures["perplexity_ratio"]["value"], figures["kld"]["value"]
    lost = f"perplexity is {ratio:.3g} times what it was and the KL divergence {kld:.3g} on {figures['text']}"
    if ratio < LOSES:
        return f"{lost}: small enough to go on; `llmc distill` would still win some of it back"
    return f"{lost}: it needs healing before it is of use: llmc distill {out} --teacher {source}"


def zeros_of(checkpoint: Checkpoint) -> tuple[list[int], list[int]]:
    """(exact zeros, weights) of the linears of each decoder layer, counted in the file."""
    skeleton = Skeleton(checkpoint, "cpu")
    zeros, weights = [0] * len(skeleton.layers), [0] * len(skeleton.layers)
    for layer, name, _ in linears_of(skeleton):
        tensor = checkpoint.tensor(skeleton.names.stored(f"{name}.weight"))
        zeros[layer] += int((tensor == 0).sum())
        weights[layer] += tensor.numel()
    return zeros, weights
