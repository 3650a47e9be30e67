"""The text to learn from: of every source as much as the steps need, some of it held out to judge by.

Text that the teacher writes itself covers what it has learned (Liu et al., 2023, arXiv:2305.17888); text of the user's covers
what the model is for. The default is the user's with a little of the teacher's mixed in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from llmc.compress.text import SELF, Calibration, from_model, load_answers, load_calibration
from llmc.errors import UserError

SELF_SEQUENCES = 128  # of the teacher's own text where there is no other: sampling takes time, steps go round and round


class TextSettings(Protocol):
    """What decides the text."""

    @property
    def calibration(self) -> tuple[str, ...]: ...
    @property
    def sampled(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def accumulate(self) -> int: ...
    @property
    def seq_len(self) -> int: ...
    @property
    def held_out(self) -> int: ...
    @property
    def seed(self) -> int: ...


@dataclass
class Texts:
    """sequences: int64 [n, seq_len], the held-out ones first.  origins: what the manifest says about their sources.
    counted: bool like sequences, which tokens are learned (None: all); every sequence has some."""

    sequences: torch.Tensor
    held_out: int
    origins: list[dict[str, Any]]
    counted: torch.Tensor | None = None

    def batch(self, step: int, size: int) -> list[int]:
        """The sequences of one step, round and round through what is not held out."""
        n = self.sequences.shape[0] - self.held_out
        return [self.held_out + (step * size + i) % n for i in range(size)]


def gather(c: TextSettings, tokenizer: Any, sample: Callable[[int], torch.Tensor], processes: int = 1,
           answers_only: bool = False) -> Texts:
    """The sequences of a run, shuffled by the seed; the held-out ones are evenly spaced over all sources.

    sample: so many sequences of the teacher's own, int64 [n, seq_len].  processes: that train together, each on its
    batches.  answers_only: of the files, only what assistants say counts.
    """
    at_once = c.batch * c.accumulate * processes
    needed = c.steps * at_once + c.held_out
    named = [spec for spec in c.calibration if spec != SELF]
    alone = max(SELF_SEQUENCES, c.held_out + at_once)
    sampled = min(needed, c.sampled if named else alone)
    parts = []
    for i, spec in enumerate(named):
        share = (needed - sampled + i) // len(named)  # the shares add up
        load = load_answers if answers_only else partial(load_calibration, samples=None)
        parts.append(_evenly(load(spec, tokenizer, seq_len=c.seq_len), share))
    if sampled:
        parts.append(from_model(sample(sampled), tokenizer, {"seed": c.seed, "temperature": 1.0}))
    ids = torch.cat([p.sequences for p in parts])
    n = ids.shape[0]
    if n < c.held_out + at_once:
        raise UserError(f"the text gives {n} sequences of {c.seq_len}, and {c.held_out} are held out",
                        "give more text, a smaller --seq-len or a smaller --held-out")
    held = {i * n // c.held_out + n // (2 * c.held_out) for i in range(c.held_out)}
    order = torch.randperm(n, generator=torch.Generator().manual_seed(c.seed)).tolist()
    rows = [*sorted(held), *(i for i in order if i not in held)]
    counted = None
    if answers_only:
        every = [torch.ones_like(p.sequences, dtype=torch.bool) if p.answers is None else p.answers for p in parts]
        counted = torch.cat(every)[rows]
    return Texts(ids[rows], c.held_out, [{**p.origin, "share": p.sequences.shape[0] / n} for p in parts], counted)


def _evenly(text: Calibration, most: int) -> Calibration:
    """At most so many of its sequences, evenly spaced."""
    n = text.sequences.shape[0]
    if n <= most:
        return text
    chosen = [i * n // most for i in range(most)]
    kept, answers = text.sequences[chosen], None if text.answers is None else text.answers[chosen]
    counts = {"samples": most, "tokens": kept.numel()}
    if answers is not None:
        counts["answer_tokens"] = int(answers.sum())
    return Calibration(kept, {**text.origin, **counts}, answers)
