"""Scores of weights, and masks of the weights that stay.

* magnitude: |W|, compared over the whole matrix. Every matrix has the same sparsity, because magnitudes of different matrices
  cannot be compared.
* Wanda (Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", 2023, arXiv:2306.11695, eq. 1):
  |W_ij| * |x_j|, compared within each output row. Weights that stay are not changed.

A column whose input was always zero gets the mean of all columns, as in the quantizer: the text never used it.
"""

from __future__ import annotations

import torch

from llmc.compress.prune.config import PATTERNS


def keep_highest(score: torch.Tensor, dropped: int) -> torch.Tensor:
    """bool, in the shape of `score`: false at the `dropped` lowest scores along the last axis. Of equal scores the first ones
    are lower."""
    lowest = score.argsort(dim=-1, stable=True)[..., :dropped]
    return torch.ones_like(score, dtype=torch.bool).scatter_(-1, lowest, False)


def keep_pattern(score: torch.Tensor, pattern: str) -> torch.Tensor:
    """bool [out, in] for the pattern 'N:M': false at the N lowest scores of each M consecutive ones in a row."""
    zeros, of = PATTERNS[pattern]
    return keep_highest(score.reshape(score.shape[0], -1, of), zeros).view(score.shape)


def magnitude_mask(weight: torch.Tensor, share: float, pattern: str | None) -> torch.Tensor:
    """bool [out, in] for a weight [out, in], true where it stays. share: of zeros, if pattern is None."""
    score = weight.abs()
    if pattern is not None:
        return keep_pattern(score, pattern)
    return keep_highest(score.flatten(), round(share * score.numel())).view(score.shape)


def wanda_mask(weight: torch.Tensor, squares: torch.Tensor, share: float, pattern: str | None) -> torch.Tensor:
    """bool [out, in] for a weight [out, in], true where it stays. squares: [in], the sum of x_j^2 over tokens.  share: of
    zeros, if pattern is None."""
    score = weight.abs() * torch.where(squares == 0, squares.mean(), squares).sqrt()
    return keep_pattern(score, pattern) if pattern is not None else keep_highest(score, round(share * score.shape[1]))


