"""Forward KL divergence of a student's next-token distributions from its teacher's, in bounded memory.

The gradient to the student's logits is known in closed form (softmax of the student's minus the teacher's probabilities), so
no graph is kept over the vocabulary: loss and gradient are made together, a few rows at a time that fit the caches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn.functional import log_softmax

CHUNK_BYTES = 48 << 20  # of logits alive at once, float32
TINY = 1e-30
CACHE_BYTES = 3 << 20  # of logits worked on at once, float32


def divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Sum over rows of KL(teacher || student) in nats. Both: logits [n, vocab]."""
    log_p, log_q = log_softmax(teacher.float(), -1), log_softmax(student.float(), -1)
    return (log_p.exp() * (log_p - log_q)).sum()


class Aim(Protocol):
    """What the teacher says at some positions."""

    def compare(self, rows: slice, student: torch.Tensor, slope: torch.Tensor | None) -> torch.Tensor:
        """Sum of the divergences at the positions `rows`. student: their logits [n, vocab]; slope: like them, takes the
        gradient."""


@dataclass(frozen=True)
class Whole:
    """All of the teacher's logits [n, vocab]."""

    logits: torch.Tensor

    def compare(self, rows: slice, student: torch.Tensor, slope: torch.Tensor | None) -> torch.Tensor:
        log_p = log_softmax(self.logits[rows], -1, dtype=torch.float32)
        log_q = log_softmax(student, -1, dtype=torch.float32)
        p = log_p.exp()
        total = torch.dot(p.view(-1), log_p.sub_(log_q).view(-1))
        if slope is not None:
            slope.copy_(log_q.exp_().sub_(p))
        return total


@dataclass(frozen=True)
class TopK:
    """The teacher's k likeliest tokens, and all others as one class: a lower bound of the whole divergence.

    logs: float32 [n, k], their log-probabilities.  ids: int64 [n, k].  rest: float32 [n], the log of what is left.
    """

    logs: torch.Tensor
    ids: torch.Tensor
    rest: torch.Tensor

    @staticmethod
    def of(whole: Whole, k: int) -> TopK:
        every = log_softmax(whole.logits, -1, dtype=torch.float32)
        logs, ids = every.topk(k, -1)
        return TopK(logs, ids, every.exp_().scatter_(1, ids, 0).sum(-1).log())

    def compare(self, rows: slice, student: torch.Tensor, slope: torch.Tensor | None) -> torch.Tensor:
        logs, ids, rest = self.logs[rows], self.ids[rows], self.rest[rows]
        log_q = log_softmax(student, -1, dtype=torch.float32)
        known = log_q.gather(1, ids)
        p, p_rest = logs.exp(), rest.exp()
        q = log_q.exp_()
        # summed over the others and not taken from 1, which would leave a float32's rounding of it
        q_rest = q.scatter(1, ids, 0).sum(-1)
        total = (p * (logs - known)).sum()
        if ids.shape[1] < student.shape[1]:
            total += torch.where(p_rest > 0, p_rest * (rest - q_rest.clamp_min(TINY).log()), 0).sum()
            scale = 1 - p_rest / q_rest.clamp_min(TINY)
        else:
            scale = torch.ones_like(p_rest)
        if slope is not None:
            inside = q.gather(1, ids) - p
            slope.copy_(q.mul_(scale[:, None]).scatter_(1, ids, inside))
        return total


def compare(student: torch.Tensor, aim: Aim, learn: bool) -> tuple[float, torch.Tensor | None]:
    """(sum of the divergences, gradient to the student's logits [n, vocab] where asked for)."""
    slope = torch.empty_like(student) if learn else None
    rows = max(1, CACHE_BYTES // (student.shape[1] * 4))
    total = torch.zeros((), device=student.device)
    for first in range(0, student.shape[0], rows):
        part = slice(first, first + rows)
        total += aim.compare(part, student[part], None if slope is None else slope[part])
    return float(total), slope


def distil(states: torch.Tensor, aims: Callable[[slice], Aim], head: Callable[[torch.Tensor], torch.Tensor], vocab: int,
           share: float | None = None) -> float:
    """Mean divergence over all positions, a few at a time; with `share`, times it, and with its gradient.

    states: the student's hidden states [n, seq_len, hidden]; the gradient goes on through them.  head: from [1, n, hidden]
    to logits [n, vocab].  aims: what the teacher says at a range of the n * seq_len positions.
    The logits of 1024 positions over 50,000 tokens would be 200 MB in float32, and a loss keeps several of their size.
    """
    flat = states.detach().reshape(-1, states.shape[-1])
    learn = share is not None
    flat.requires_grad_(learn)
    positions, total = flat.shape[0] / (1.0 if share is None else share), 0.0
    rows = max(1, CHUNK_BYTES // (vocab * 4))
    for first in range(0, flat.shape[0], rows):
        part = slice(first, first + rows)
        with torch.set_grad_enabled(learn):
            logits = head(flat[part][None])
        with torch.no_grad():
            found, slope = compare(logits.detach(), aims(part), learn)
        if slope is not None:
            logits.backward(slope.div_(positions))  # type: ignore[no-untyped-call]
        total += found / positions
    if learn:
        assert flat.grad is not None
        states.backward(flat.grad.view(states.shape))  # type: ignore[no-untyped-call]
    return total
