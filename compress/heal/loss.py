"""Forward KL divergence of a student's next-token distributions from its teacher's, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import log_softmax

CHUNK_BYTES = 48 << 20  # of logits alive at once, float32


def divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Sum over rows of KL(teacher || student) in nats. Both: logits [n, vocab]."""
    log_p, log_q = log_softmax(teacher.float(), -1), log_softmax(student.float(), -1)
    return (log_p.exp() * (log_p - log_q)).sum()


def distil(states: torch.Tensor, known: torch.Tensor, student_head: Callable[[torch.Tensor], torch.Tensor],
           teacher_head: Callable[[torch.Tensor], torch.Tensor], vocab: int, share: float | None = None) -> float:
    """Mean KL divergence over all positions, a few at a time; with `share`, times it, and with its gradient.

    states, known: hidden states [n, seq_len, hidden] of student and teacher; the gradient goes on through `states`.
    The logits of 1024 positions over 50,000 tokens would be 200 MB in float32, and a loss keeps several of their size.
    """
    width = states.shape[-1]
    flat, other = states.detach().reshape(-1, width), known.reshape(-1, width)
    learn = share is not None
    flat.requires_grad_(learn)
    positions, total = flat.shape[0] / (1.0 if share is None else share), 0.0
    rows = max(1, CHUNK_BYTES // (vocab * 4))
    for first in range(0, flat.shape[0], rows):
        part = slice(first, first + rows)
        with torch.no_grad():
            aim = teacher_head(other[part][None])
        with torch.set_grad_enabled(learn):
            loss = divergence(student_head(flat[part][None]), aim) / positions
        if learn:
            loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    if learn:
        assert flat.grad is not None
        states.backward(flat.grad.view(states.shape))  # type: ignore[no-untyped-call]
    return total
