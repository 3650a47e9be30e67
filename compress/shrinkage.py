"""How far the statistics of a linear's inputs can be trusted, from how much they differ between the sequences of the text.

A sum H of x x^T over few tokens has correlations between columns that other text does not have. GPTQ then learns the
calibration text by heart: it moves errors into directions that look harmless only there. So the entries of H outside of its
diagonal are shrunk by a share. If the share is 1, only the diagonal is left: rounding weighted by importance.

The share is the relative standard error of these entries,  (sum var(H_ij) / sum H_ij^2) ^ 1/2  over i != j. Its square is the
share with the least expected squared error of H (Schäfer and Strimmer, "A shrinkage approach to large-scale covariance matrix
estimation", 2005, eq. 8, with the diagonal as target). A sequence is one observation, because tokens of one text are alike:
with the sums h_s of m sequences

    var(H_ij) = m / (m - 1) (sum_s h_s,ij^2 - H_ij^2 / m)

It is estimated on SAMPLED rows of H, which is cheap beside H itself.

Why the root: output errors of four layers of SmolLM2-135M on other text (WikiText-2 valid / code / other languages), q4_0,
relative to no shrinking. Calibration on 6, 36 and 128 sequences of 512 tokens:

                 6                    36                   128
    q_proj       0.93 / 0.83 / 0.92   1.00 / 0.93 / 0.97   0.98 / 0.96 / 0.96
    o_proj       0.87 / 0.75 / 0.88   0.98 / 0.86 / 1.00   0.96 / 0.94 / 0.98
    gate_proj    0.87 / 0.69 / 0.85   0.98 / 0.85 / 0.95   0.99 / 0.90 / 0.98
    down_proj    0.68 / 0.59 / 0.63   0.95 / 0.85 / 0.91   0.97 / 0.93 / 0.95

The square itself gave 0.70 to 1.01. A damping of 0.3 for all gave 0.63 to 0.94, 0.82 to 1.09 and 0.88 to 1.09.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

SAMPLED = 64  # rows of H on which its variance is estimated
MOST = 0.99  # with 1, `restore` could not undo it


@dataclass
class Variation:
    """Sums over sequences. squares: of the entries h_s,ij^2 of the sampled rows, outside of the diagonal.  sequences: m."""

    squares: float = 0.0
    sequences: int = 0

    def add(self, rows: torch.Tensor) -> None:
        """Add sequences: rows float32 [n, seq_len, in] of their inputs x."""
        sampled = picked(rows.shape[-1]).to(rows.device)
        chosen = rows[..., sampled]
        products = torch.bmm(chosen.transpose(1, 2), rows)  # [n, sampled, in]
        diagonal = chosen.square().sum(1)
        self.squares += float(products.square().sum(dtype=torch.float64) - diagonal.square().sum(dtype=torch.float64))
        self.sequences += len(rows)

    def total(self, other: Variation) -> None:
        self.squares += other.squares
        self.sequences += other.sequences

    def share(self, hessian: torch.Tensor) -> float:
        """The share for the sum `hessian` [in, in] over these sequences, at most MOST. For one sequence it is MOST, because
        one sequence says nothing about others."""
        if self.sequences < 2:
            return MOST
        rows = picked(len(hessian)).to(hessian.device)
        whole = float(hessian[rows].square().sum(dtype=torch.float64)
                      - hessian.diagonal()[rows].square().sum(dtype=torch.float64))
        if not whole > 0:
            return 0.0  # there is nothing to shrink
        m = self.sequences
        variance = m / (m - 1) * max(0.0, self.squares / whole - 1 / m)
        return min(MOST, math.sqrt(variance))


def picked(n: int) -> torch.Tensor:
    """The sampled rows of n, evenly spaced, int64."""
    count = min(n, SAMPLED)
    return torch.arange(count) * n // count


def shrink(hessian: torch.Tensor, share: float) -> None:
    """Multiply the entries of `hessian` [in, in] outside of its diagonal by 1 - share, in place."""
    _scale(hessian, 1 - share, hessian.diagonal().clone())


def restore(hessian: torch.Tensor, share: float, diagonal: torch.Tensor) -> None:
    """Undo `shrink`, up to the rounding of floats, and set the diagonal [in]."""
    _scale(hessian, 1 / (1 - share), diagonal)


def _scale(hessian: torch.Tensor, by: float, diagonal: torch.Tensor) -> None:
    if by != 1:
        hessian.mul_(by)
    hessian.diagonal().copy_(diagonal)
