"""The loss of quality by pruning: perplexity, and KL divergence from the source, on held-out calibration sequences.

The metrics are those of `llmc eval` (evals/quality/metrics.py), over the second half of every sequence as in its protocol.
Both models run layer by layer in float32. The memory holds one layer, the states and a part of the logits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmc.compress import text
from llmc.compress.forward import Run, head_of, run
from llmc.compress.skeleton import Skeleton, linears_of
from llmc.console import command
from llmc.evals.quality import metrics
from llmc.evals.quality.protocol import FolderTokenizer
from llmc.formats.checkpoint import Checkpoint

LOSES = 1.05  # from this ratio of perplexities on, the advice is to train the model again


def split(sequences: torch.Tensor, held_out: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (the sequences for pruning, the held-out sequences). held_out: number of the latter; they are evenly spaced
    over all sequences [n, seq_len]."""
    n = sequences.shape[0]
    held = text.held_out(n, held_out)
    return sequences[sorted(set(range(n)) - set(held))], sequences[held]


@torch.no_grad()
def judge(source: Path, pruned: Path, sequences: torch.Tensor, name: str, device: str) -> dict[str, Any]:
    """The metrics of metrics.summarise, each a value with its standard error, and a description of the measurement.

    sequences: int64 [n, seq_len]. They begin as the tokenizer begins a text, because calibration text does.
    name: of the text.
    """
    tokenizer = FolderTokenizer(source)
    before = run(source, sequences, device, None, "the source")
    after = run(pruned, sequences, device, None, "the pruned model")
    first = sequences.shape[1] // 2
    targets = sequences[:, first + 1 :].numpy()
    nll, base_nll, kld = (np.empty(targets.shape, np.float32) for _ in range(3))
    top1 = np.empty(targets.shape, bool)
    with head_of(before) as base_head, head_of(after) as head:
        for i, nexts in enumerate(targets):
            wanted, got = (_logits(ran, to_logits, i, first) for ran, to_logits in ((before, base_head), (after, head)))
            nll[i], base_nll[i] = metrics.nll(got, nexts), metrics.nll(wanted, nexts)
            kld[i], top1[i] = metrics.divergence(wanted, got)
    scored = sum(len(tokenizer.decode(row).encode()) for row in targets)
    return {"text": f"{len(sequences)} sequences of {name} that pruning did not use", "sequences": len(sequences),
            "seq_len": sequences.shape[1],
            "scored": f"tokens {first + 1} to {sequences.shape[1] - 1} of each (counted from 0)",
            "scored_tokens": int(targets.size), **metrics.summarise(nll, scored, kld, top1, base_nll)}


def _logits(ran: Run, to_logits: Any, i: int, first: int) -> np.ndarray:
    """float32 [scored, vocab]: the logits that predict the tokens after token `first` of sequence i."""
    states = ran.states[i : i + 1, ..., first:-1, :].contiguous()
    found: torch.Tensor = to_logits(states)[0]
    return found.float().cpu().numpy()


def advice(figures: dict[str, Any], source: Path, out: Path) -> str:
    """One sentence on the loss of quality and the next step."""
    ratio, kld = figures["perplexity_ratio"]["value"], figures["kld"]["value"]
    lost = f"perplexity is {ratio:.3g} times that of the source and the KL divergence is {kld:.3g} on {figures['text']}"
    if ratio < LOSES:
        return f"{lost}: the loss is small; `llmc distill` can recover a part of it"
    return f"{lost}: the loss is large, train the model before use: {command('llmc', 'distill', out, '--teacher', source)}"


def zeros_of(checkpoint: Checkpoint) -> tuple[list[int], list[int]]:
    """Returns (number of exact zeros, number of weights) in the linears of each decoder layer, counted in the file."""
    skeleton = Skeleton(checkpoint, "cpu")
    zeros, weights = [0] * len(skeleton.layers), [0] * len(skeleton.layers)
    for layer, name, _ in linears_of(skeleton):
        tensor = skeleton.names.read(f"{name}.weight")
        assert tensor is not None
        zeros[layer] += int((tensor == 0).sum())
        weights[layer] += tensor.numel()
    return zeros, weights
