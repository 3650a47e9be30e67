"""Rounding to levels that are not evenly spaced, by a look-up instead of a search."""

from __future__ import annotations

from functools import lru_cache

import torch


class Levels:
    """The levels of a type: whole numbers, ascending and not evenly spaced, one for each code.

    The borders between levels are whole or half numbers. So the nearest level is the same for all x in
    (k - 1) / 2 < x <= k / 2, and a table indexed by k = ceil(2 x) is exact. On a border it gives the lower level, like
    torch.bucketize.
    """

    def __init__(self, levels: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        values = torch.tensor(levels, dtype=dtype, device=device)
        borders = values[1:] + values[:-1]  # twice the borders
        self.lowest, self.highest = min(0, int(borders[0])), max(0, int(borders[-1]) + 1)
        codes = torch.bucketize(torch.arange(self.lowest, self.highest + 1, dtype=dtype, device=device), borders)
        codes = torch.bucketize(values[codes], values, right=True) - 1  # of two codes for one level (mxfp4's zeros) the upper
        codes = codes.roll(self.lowest)  # entry 0 comes first; a negative k counts from the end
        self.codes, self.values = codes.to(dtype), values[codes]

    def entries(self, doubled: torch.Tensor) -> torch.Tensor:
        """The indices, in `codes` and `values`, of the levels nearest to `doubled` / 2, for torch.take.

        It changes `doubled` in place."""
        return doubled.ceil_().clamp_(self.lowest, self.highest).long()


@lru_cache
def levels_of(levels: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Levels:
    return Levels(levels, dtype, device)
