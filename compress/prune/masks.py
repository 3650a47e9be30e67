"""Which weights of a matrix stay: scores and masks, and what a manifest says of a mask that must be kept.

* magnitude: |W|, over the whole matrix. Every matrix has the same sparsity: thresholds of different matrices do not compare.
* Wanda (Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", 2023, arXiv:2306.11695, eq. 1):
  |W_ij| * |x_j|, compared within each output row. Weights that stay are not changed.

A column whose input was always zero (the text says nothing about it) counts like the mean column, as in the quantizer.
"""

from __future__ import annotations

import torch

from llmc.compress.prune.config import PATTERNS


def keep_highest(score: torch.Tensor, dropped: int) -> torch.Tensor:
    """bool, like `score`: false at exactly `dropped` lowest places of its last axis (of equal ones, the first)."""
    lowest = score.argsort(dim=-1, stable=True)[..., :dropped]
    return torch.ones_like(score, dtype=torch.bool).scatter_(-1, lowest, False)


def keep_pattern(score: torch.Tensor, pattern: str) -> torch.Tensor:
    """bool [out, in]: of each M consecutive weights of a row the N lowest go, for the pattern 'N:M'."""
    zeros, of = PATTERNS[pattern]
    return keep_highest(score.reshape(score.shape[0], -1, of), zeros).view(score.shape)


def magnitude_mask(weight: torch.Tensor, share: float, pattern: str | None) -> torch.Tensor:
    """bool [out, in] for a weight [out, in]."""
    score = weight.abs()
    if pattern is not None:
        return keep_pattern(score, pattern)
    return keep_highest(score.flatten(), round(share * score.numel())).view(score.shape)


def wanda_mask(weight: torch.Tensor, squares: torch.Tensor, share: float, pattern: str | None) -> torch.Tensor:
    """bool [out, in] for a weight [out, in]. squares: [in], the sum of x_j^2 over tokens."""
    score = weight.abs() * torch.where(squares == 0, squares.mean(), squares).sqrt()
    return keep_pattern(score, pattern) if pattern is not None else keep_highest(score, round(share * score.shape[1]))


