"""GPTQ's sweep and descent for types with a codebook: the codes of 8 columns are chosen together (llmc/rounding/codebook.py).

The algorithms are those of gptq.py, with 8 columns in place of one. Let B be the part of the inverse Hessian of these
columns, after the columns that are swept already: an error e of them costs  e B^-1 e^T  if all later columns compensate it,
and moves these by  e B^-1 (H^-1)_later.  With U^T U = H^-1, U_b the part of U of these columns and U_l that of the later ones
beside it,  B = U_b^T U_b  and  (H^-1)_later = U_b^T U_l.  So they move by  e U_b^-1 U_l.

All matrices are [in, out]. The 8 columns of a choice stay together and in their order, whatever the order of the sweep is.
"""

from __future__ import annotations

import torch

from llmc.formats.types import BlockType
from llmc.rounding.block_factors import BlockFactors
from llmc.rounding.codebook import STEP, entries
from llmc.rounding.scales import reciprocal

BLOCK = 64  # columns swept before the rest of the matrix is updated


class Choices:
    """Chooses the codes of one step after the other, with fixed factors."""

    def __init__(self, factors: BlockFactors) -> None:
        qtype: BlockType = factors.type
        scale = factors.group_scales()
        self.book = entries(qtype, scale.device)
        self.scale, self.inverse, self.shift = scale, reciprocal(scale), factors.shift
        self.in_group = qtype.group // STEP

    def choose(self, step: int, target: torch.Tensor, metric: torch.Tensor,
               present: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(codes, values) [STEP, out] of a step, nearest to the target [STEP, out] under the metric [STEP, STEP].

        present: the values so far; the error does not rise."""
        group = step // self.in_group
        inverse, shift = self.inverse[group], None if self.shift is None else self.shift[group]
        levels = self.book.choose((target * inverse).t().contiguous(), metric,
                                  None if present is None else self.book.rounded((present * inverse).t()), shift).t()
        return self.book.codes(levels), levels * self.scale[group]


def in_steps(order: torch.Tensor) -> list[int]:
    """The number of each step in an order of columns that keeps steps together."""
    return (order[::STEP] // STEP).tolist()


def sweep(w: torch.Tensor, factor: torch.Tensor, factors: BlockFactors, order: torch.Tensor) -> torch.Tensor:
    """The codes (as floats) [in, out].

    w: [in, out], overwritten.  factor: U with U^T U = H^-1.  order: of the columns in both, and in the result."""
    n = w.shape[0]
    choices, codes = Choices(factors), torch.empty_like(w)
    errors = torch.empty_like(w[:BLOCK])
    steps = in_steps(order)
    own = torch.stack([factor[i : i + STEP, i : i + STEP] for i in range(0, n, STEP)])
    inverses = torch.linalg.solve_triangular(own, torch.eye(STEP, device=w.device).expand_as(own), upper=True)
    metrics = inverses @ inverses.transpose(1, 2)
    scaled = torch.bmm(inverses, factor.view(-1, STEP, n)).view(n, n)
    for start in range(0, n, BLOCK):
        end = min(start + BLOCK, n)
        for i in range(start, end, STEP):
            columns = slice(i, i + STEP)
            metric = metrics[i // STEP]
            codes[columns], values = choices.choose(steps[i // STEP], w[columns], metric / metric.diagonal().mean())
            error = torch.sub(values, w[columns], out=errors[i - start : i - start + STEP])
            w[i + STEP : end].addmm_(scaled[columns, i + STEP : end].t(), error)
        w[end:].addmm_(scaled[start:end, end:].t(), errors[: end - start])
    return codes


def descend(hessian: torch.Tensor, codes: torch.Tensor, values: torch.Tensor, gradient: torch.Tensor,
            factors: BlockFactors) -> None:
    """One pass of descent: one step after another gets the best codes for the present others.

    Changed in place, all [in, out]: codes, their values q, gradient = H (q - w)^T."""
    n, choices = codes.shape[0], Choices(factors)
    own = torch.stack([hessian[i : i + STEP, i : i + STEP] for i in range(0, n, STEP)])
    lower, info = torch.linalg.cholesky_ex(own)
    for start in range(0, n, BLOCK):
        end = min(start + BLOCK, n)
        before, inside = values[start:end].clone(), gradient[start:end].clone()
        for i in range(start, end, STEP):
            columns, at = slice(i, i + STEP), i // STEP
            if int(info[at]) != 0:
                continue
            slope = inside[i - start : i - start + STEP]
            present = values[columns]
            metric = own[at]
            target = present - torch.cholesky_solve(slope, lower[at])
            codes[columns], found = choices.choose(at, target, metric / metric.diagonal().mean(), present)
            moved = found - present
            values[columns] = found
            inside[i - start + STEP :].addmm_(hessian[i + STEP : end, columns], moved)
        gradient.addmm_(hessian[:, start:end], values[start:end] - before)
