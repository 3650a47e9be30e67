"""The divergence of a student's next-token distributions from its teacher's, and its gradient, in bounded memory.

The gradients with respect to the student's logits z have a closed form (q = softmax(z), p: the teacher's probabilities):

    forward KL  sum p log(p/q)    dz = q - p                    Hinton et al., 2015, arXiv:1503.02531
    reverse KL  sum q log(q/p)    dz = q (log(q/p) - KL)        Gu et al., "MiniLLM", 2023, arXiv:2306.08543, section 2
    cross-entropy -log q(next)    dz = q - onehot(next)

So autograd needs no graph over the vocabulary: loss and gradient are computed together, a few rows at a time, so that they
fit the caches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch.nn.functional import log_softmax

CHUNK_BYTES = 48 << 20  # logits in memory at a time, float32
TINY = 1e-30
CACHE_BYTES = 3 << 20  # logits processed at a time, float32

Part = slice | torch.Tensor  # some positions: a range, or their indices


def divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Sum over rows of KL(teacher || student) in nats. Both: logits [n, vocab]."""
    log_p, log_q = log_softmax(teacher.float(), -1), log_softmax(student.float(), -1)
    return (log_p.exp() * (log_p - log_q)).sum()


class SoftTargets(Protocol):
    """The teacher's next-token distributions at some positions."""

    def compare(self, rows: slice, student: torch.Tensor, slope: torch.Tensor | None, reverse: bool) -> torch.Tensor:
        """Sum of the KL divergences, forward or reverse, at the positions `rows`. student: the student's logits there,
        [n, vocab].  slope: overwritten with the gradient, [n, vocab]; None for no gradient."""


SoftTargetsOf = Callable[[Part], SoftTargets]  # the distributions at a part of the positions (sequences in a row)


@dataclass(frozen=True)
class Whole:
    """All of the teacher's logits [n, vocab]."""

    logits: torch.Tensor

    def compare(self, rows: slice, student: torch.Tensor, slope: torch.Tensor | None, reverse: bool = False) -> torch.Tensor:
        log_p = log_softmax(self.logits[rows], -1, dtype=torch.float32)
        log_q = log_softmax(student, -1, dtype=torch.float32)
        if reverse:
            gap, q = log_q - log_p, log_q.exp_()
            each = (q * gap).sum(-1, keepdim=True)
            if slope is not None:
                slope.copy_(gap.sub_(each).mul_(q))
            return each.sum()
        p = log_p.exp()
        total = torch.dot(p.view(-1), log_p.sub_(log_q).view(-1))
        if slope is not None:
            slope.copy_(log_q.exp_().sub_(p))
        return total


@dataclass(frozen=True)
class TopK:
    """The teacher's k most likely tokens, and all others as one class. It gives a lower bound of the divergence.

    logs: float32 [n, k], the log-probabilities of these tokens.  ids: int64 [n, k].  rest: float32 [n], the log-probability
    of all others.
    """

    logs: torch.Tensor
    ids: torch.Tensor
    rest: torch.Tensor

    @staticmethod
    def of(whole: Whole, k: int) -> TopK:
        every = log_softmax(whole.logits, -1, dtype=torch.float32)
        logs, ids = every.topk(k, -1)
        return TopK(logs, ids, every.exp_().scatter_(1, ids, 0).sum(-1).log())

    def compare(self, rows: slice, student: torch.Tensor, slope: torch.Tensor | None, reverse: bool = False) -> torch.Tensor:
        logs, ids, rest = self.logs[rows], self.ids[rows], self.rest[rows]
        log_q = log_softmax(student, -1, dtype=torch.float32)
        known = log_q.gather(1, ids)
        q = log_q.exp_()
        whole = ids.shape[1] == student.shape[1]  # no other tokens
        # a sum over the others: 1 - (sum of the k) would have the rounding error of float32
        q_rest = q.scatter(1, ids, 0).sum(-1).clamp_min(TINY)
        if reverse:
            gap, gap_rest = known - logs, q_rest.log() - rest.clamp_min(math.log(TINY))
            if whole:
                gap_rest = torch.zeros_like(gap_rest)
            each = (known.exp() * gap).sum(-1) + q_rest * gap_rest
            if slope is not None:
                inside = known.exp() * (gap - each[:, None])
                slope.copy_(q.mul_((gap_rest - each)[:, None]).scatter_(1, ids, inside))
            return each.sum()
        p, p_rest = logs.exp(), rest.exp()
        total = (p * (logs - known)).sum()
        if not whole:
            total += torch.where(p_rest > 0, p_rest * (rest - q_rest.log()), 0).sum()
        if slope is not None:
            scale = torch.ones_like(p_rest) if whole else 1 - p_rest / q_rest
            inside = q.gather(1, ids) - p
            slope.copy_(q.mul_(scale[:, None]).scatter_(1, ids, inside))
        return total


@dataclass(frozen=True)
class Objective:
    """(1 - ce_weight) T^2 KL_T + ce_weight CE. KL_T is the divergence of both distributions at temperature T. The factor T^2
    makes the size of its gradients independent of T (Hinton et al., section 2). The soft targets must be at the same
    temperature."""

    reverse: bool = False
    temperature: float = 1.0
    ce_weight: float = 0.0


class Compared(NamedTuple):
    """loss: the sum of the objective over rows.  nll: the sum of the next tokens' negative log-likelihoods in nats, 0 if no
    next tokens are given.  slope: the gradient of the loss with respect to the logits, None if it was not requested."""

    loss: torch.Tensor
    nll: torch.Tensor
    slope: torch.Tensor | None


FORWARD = Objective()


@torch.no_grad()
def compare(student: torch.Tensor, soft_targets: SoftTargets, learn: bool, objective: Objective = FORWARD,
            targets: torch.Tensor | None = None, vocab: int | None = None) -> Compared:
    """Compute the objective and, with `learn`, its gradient.

    student: logits [n, rows of the head].  vocab: number of logits that are compared (the first ones); None means all.
    targets: int64 [n], the next tokens.
    """
    t, ce, width = objective.temperature, objective.ce_weight, vocab or student.shape[1]
    slope = torch.zeros_like(student) if learn else None
    rows = max(1, CACHE_BYTES // (width * 4))
    total, nll = torch.zeros(2, device=student.device)
    for first in range(0, student.shape[0], rows):
        part = slice(first, first + rows)
        z, dz = student[part, :width], None if slope is None else slope[part, :width]
        if ce < 1:
            found = soft_targets.compare(part, z if t == 1 else z / t, dz, objective.reverse)
            total += (1 - ce) * t * t * found
            if dz is not None and (ce or t != 1):
                dz.mul_((1 - ce) * t)
        if targets is None:
            continue
        log_q, nexts = log_softmax(z, -1, dtype=torch.float32), targets[part, None]
        missed = -log_q.gather(1, nexts).sum()
        nll += missed
        if ce:
            total += ce * missed
            if dz is not None:
                dz.add_(log_q.exp_().scatter_add_(1, nexts, nexts.new_full(nexts.shape, -1, dtype=torch.float32)), alpha=ce)
    return Compared(total, nll, slope)


class _Closed(torch.autograd.Function):
    """The mean objective over positions, whose gradients are computed in the forward pass. flat: [positions, hidden].
    parameters: of the head."""

    @staticmethod
    def forward(ctx: Any, flat: torch.Tensor, over: Callable[[torch.Tensor, bool], Any], learn: bool,
                *_parameters: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss, nll, ctx.gradients = over(flat.detach(), learn)
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dflat, *rest = (None if g is None else g * grads[0] for g in ctx.gradients)
        return dflat, None, None, *rest


def distillation_loss(states: torch.Tensor, soft_targets: SoftTargetsOf, head: Callable[[torch.Tensor], torch.Tensor],
                      vocab: int, objective: Objective = FORWARD, targets: torch.Tensor | None = None,
                      parameters: Sequence[torch.Tensor] = ()) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (mean objective, mean negative log-likelihood of the next tokens) over positions. The first is differentiable
    with respect to `states` and `parameters`.

    states: the student's hidden states [n, seq_len, hidden].  head: from [1, n, hidden] to logits [n, vocab or more].
    soft_targets: the teacher's distributions at the n * seq_len positions.  targets: int64 [n * seq_len], the next token of
    each position, -1 if a position does not count; None: all positions count, and the likelihood is 0.
    parameters: those of the head that are trained.
    It processes a few positions at a time: the logits of 1024 positions over 50,000 tokens would take 200 MB in float32, and
    a loss needs several tensors of this size.
    """
    flat, counted = states.reshape(-1, states.shape[-1]), None
    if targets is not None:
        counted = (targets >= 0).nonzero().squeeze(1)
        flat, targets = flat.index_select(0, counted), targets[counted]
    learn = torch.is_grad_enabled() and any(x.requires_grad for x in (flat, *parameters))

    def over(flat: torch.Tensor, learn: bool) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor | None]]:
        leaves = [flat.requires_grad_(learn), *parameters]
        positions, rows = flat.shape[0], max(1, CHUNK_BYTES // (vocab * 4))
        total, nll = torch.zeros(2, device=flat.device)
        gradients: list[torch.Tensor | None] = [torch.zeros_like(x) if learn else None for x in leaves]
        for first in range(0, positions, rows):
            part = slice(first, first + rows)
            with torch.set_grad_enabled(learn):
                logits = head(flat[part][None])
            found = compare(logits.detach(), soft_targets(part if counted is None else counted[part]), learn, objective,
                            None if targets is None else targets[part], vocab)
            total, nll = total + found.loss / positions, nll + found.nll / positions
            if found.slope is not None:
                made = torch.autograd.grad(logits, leaves, found.slope.div_(positions), allow_unused=True)
                for kept, new in zip(gradients, made, strict=True):
                    if kept is not None and new is not None:
                        kept.add_(new)
        return total, nll, gradients

    loss, nll = _Closed.apply(flat, over, learn, *parameters)
    return loss, nll
