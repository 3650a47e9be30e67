"""SparseGPT: choose zeros column by column; the columns that follow compensate the error of each column.

Frantar & Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", 2023 (arXiv:2301.00774),
algorithm 1: the mask of BLOCK columns is chosen when the sweep reaches them, by the error w^2 / [H^-1]_jj that remains after
optimal compensation when a weight is removed (eq. 3). A pattern N:M is chosen every M columns (section 3.3).

Differences: a dead column gets the mean of the diagonal and is not dropped. After the sweep, the weights that stay are
optimized for the mask, because the sweep does not change columns that it has passed.

Matrices are [in, out], as in the quantizer's gptq.py.
"""

from __future__ import annotations

import torch

from llmc.compress.prune.config import PATTERNS
from llmc.compress.prune.masks import keep_highest, keep_pattern

BLOCK = 128  # columns whose mask is chosen at once
STEPS = 16  # steps of conjugate gradients


def sweep(w: torch.Tensor, factor: torch.Tensor, share: float, pattern: str | None) -> torch.Tensor:
    """Algorithm 1. w [in, out] is pruned in place; factor: U [in, in] with U^T U = H^-1. Returns the mask, bool [in, out]."""
    n, out = w.shape
    keep = torch.empty_like(w, dtype=torch.bool)
    spread = factor.diagonal()[:, None]  # its squares: [H^-1]_jj once all columns before j are fixed
    scaled = factor / spread
    of = PATTERNS[pattern][1] if pattern is not None else BLOCK
    for start in range(0, n, BLOCK):
        end = min(start + BLOCK, n)
        errors = torch.empty_like(w[start:end])
        for i in range(start, end):
            if (i - start) % of == 0:
                ahead = slice(i, min(i + of, end))
                score = (w[ahead] / spread[ahead]).square_()
                if pattern is not None:
                    keep[ahead] = keep_pattern(score.t(), pattern).t()
                else:  # rounded so that all blocks together have the share
                    dropped = round(share * end * out) - round(share * start * out)
                    keep[ahead] = keep_highest(score.flatten(), dropped).view(score.shape)
            torch.mul(w[i], keep[i].to(w.dtype).sub_(1), out=errors[i - start])  # the change of the weight
            w[i].mul_(keep[i])
            w[i + 1 : end].addr_(scaled[i, i + 1 : end], errors[i - start])
        w[end:].addmm_(scaled[start:end, end:].t(), errors)
    return keep


def reconstruct(w: torch.Tensor, target: torch.Tensor, keep: torch.Tensor, hessian: torch.Tensor,
                steps: int = STEPS) -> torch.Tensor:
    """Returns weights [in, out], zero outside `keep`, with a lower error (w - target)^T H (w - target) for each output.

    It runs conjugate gradients (Hestenes & Stiefel, 1952) on the weights that stay, from `w`, with H's diagonal as the
    preconditioner. Every step lowers the error of every output.
    """
    mask, scale = keep.to(w.dtype), hessian.diagonal()[:, None]
    w = w * mask
    residual = (hessian @ (target - w)).mul_(mask)
    ahead = residual / scale
    direction, size = ahead.clone(), (residual * ahead).sum(0)
    for _ in range(steps):
        turned = hessian @ direction
        curve = (direction * turned).sum(0)
        step = torch.where(curve > 0, size / curve, 0.0)
        w.addcmul_(direction, step)
        residual.sub_(turned.mul_(mask).mul_(step))
        ahead = residual / scale
        before, size = size, (residual * ahead).sum(0)
        direction.mul_(torch.where(before > 0, size / before, 0.0)).add_(ahead)
    return w
