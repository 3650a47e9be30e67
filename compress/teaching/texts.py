"""The training text: as many sequences of every source as the steps need, and some held-out ones.

Text sampled from the teacher covers what it has learned (Liu et al., 2023, arXiv:2305.17888). Text of the user covers the
later use of the model. By default some sampled text is mixed with the user's text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from llmc.compress.text import SELF, Calibration, from_model, load_answers, load_calibration
from llmc.errors import UserError

SELF_SEQUENCES = 128  # most sampled sequences if there is no other text: sampling takes time, so the steps reuse them


class TextSettings(Protocol):
    """The options that affect the text."""

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
    """sequences: int64 [n, seq_len], the held-out ones first.  held_out: their number.  origins: the sources of the text, for
    the manifest.  counted: bool [n, seq_len], the tokens to learn, at least one in every sequence; None means all."""

    sequences: torch.Tensor
    held_out: int
    origins: list[dict[str, Any]]
    counted: torch.Tensor | None = None

    def batch(self, step: int, size: int) -> list[int]:
        """The `size` sequences of batch number `step`. The batches cycle through the sequences that are not held out."""
        n = self.sequences.shape[0] - self.held_out
        return [self.held_out + (step * size + i) % n for i in range(size)]


def gather(c: TextSettings, tokenizer: Any, sample: Callable[[int], torch.Tensor], processes: int = 1,
           answers_only: bool = False, rows: int | None = None) -> Texts:
    """The sequences of a run, shuffled by the seed. UserError if the text is too short.

    The held-out sequences depend only on the files and on their number, so runs of different lengths have the same ones. They
    are evenly spaced over all files or, without files, over the sampled text.

    sample: from a number n to sampled sequences of the teacher, int64 [n, seq_len].  processes: number of processes that
    train together, each on its own batches.  answers_only: of the files, learn only the assistant's messages.  rows: of
    the smallest embedding; None: the ids are not compared with it.
    """
    at_once = c.batch * c.accumulate * processes
    needed = c.steps * at_once
    named = [spec for spec in c.calibration if spec != SELF]
    sampled = min(needed, c.sampled) if named else c.held_out + min(needed, max(SELF_SEQUENCES - c.held_out, at_once))
    load = partial(load_answers, rows=rows) if answers_only else partial(load_calibration, samples=None, rows=rows)
    whole = [load(spec, tokenizer, seq_len=c.seq_len) for spec in named]
    own = [from_model(sample(sampled), tokenizer, {"seed": c.seed, "temperature": 1.0})] if sampled else []
    held, rest = _hold_out(whole or own, c.held_out)
    from_files = needed - sampled if named else needed
    # the shares of the files add up to from_files
    taught = [_evenly(r, (from_files + i) // len(rest)) for i, r in enumerate(rest)] + (own if named else [])
    n = sum(p.sequences.shape[0] for p in taught)
    if n < at_once or len(held.sequences) < c.held_out:
        raise UserError(f"the text gives {n + len(held.sequences)} sequences of {c.seq_len}, and {c.held_out} are held out",
                        "give more text, a smaller --seq-len or a smaller --held-out")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(c.seed))
    ids = torch.cat([held.sequences, torch.cat([p.sequences for p in taught])[order]])
    counted = None
    if answers_only:
        counted = torch.cat([_counted(held), torch.cat([_counted(p) for p in taught])[order]])
    return Texts(ids, c.held_out, [{**p.origin, "share": p.sequences.shape[0] / n} for p in taught], counted)


def _hold_out(parts: list[Calibration], number: int) -> tuple[Calibration, list[Calibration]]:
    """Returns (`number` sequences, evenly spaced over all parts; the other sequences of each part)."""
    total = sum(p.sequences.shape[0] for p in parts)
    chosen = {i * total // number + total // (2 * number) for i in range(min(number, total))}
    held, rest, start = [], [], 0
    for part in parts:
        n = part.sequences.shape[0]
        is_held = torch.tensor([start + i in chosen for i in range(n)], dtype=torch.bool)
        held.append(_rows(part, is_held))
        rest.append(_rows(part, ~is_held))
        start += n
    answers = None if held[0].answers is None else torch.cat([_counted(h) for h in held])
    return Calibration(torch.cat([h.sequences for h in held]), {}, answers), rest


def _evenly(text: Calibration, most: int) -> Calibration:
    """At most `most` of its sequences, evenly spaced."""
    n = text.sequences.shape[0]
    return text if n <= most else _rows(text, torch.tensor([i * n // most for i in range(most)], dtype=torch.int64))


def _rows(text: Calibration, which: torch.Tensor) -> Calibration:
    """Some of its sequences.  which: int64 indices, or bool [samples]."""
    kept, answers = text.sequences[which], None if text.answers is None else text.answers[which]
    counts = {"samples": kept.shape[0], "tokens": kept.numel()}
    if answers is not None:
        counts["answer_tokens"] = int(answers.sum())
    return Calibration(kept, {**text.origin, **counts}, answers)


def _counted(text: Calibration) -> torch.Tensor:
    """bool [samples, seq_len]: the tokens to learn."""
    return torch.ones_like(text.sequences, dtype=torch.bool) if text.answers is None else text.answers
