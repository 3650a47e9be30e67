"""The nearest of levels that are not evenly spaced, by a look-up instead of a search."""

from __future__ import annotations

from functools import lru_cache

import torch


class Levels:
    """Whole numbers that codes stand for, ascending and not evenly spaced, with the nearest of them by a look-up.

    The borders between levels are whole or half numbers, so which level is nearest is the same for all x in (k - 1) / 2 <
    x <= k / 2: a table over k = ceil(2 x) decides exactly. On a border the lower level is taken, as torch.bucketize would.
    """

    def __init__(self, levels: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        values = torch.tensor(levels, dtype=dtype, device=device)
        borders = values[1:] + values[:-1]  # twice the borders
        self.lowest, self.highest = min(0, int(borders[0])), max(0, int(borders[-1]) + 1)
        codes = torch.bucketize(torch.arange(self.lowest, self.highest + 1, dtype=dtype, device=device), borders)
        codes = codes.roll(self.lowest)  # entry 0 first: those of negative k are counted from the end
        self.codes, self.values = codes.to(dtype), values[codes]

    def entries(self, doubled: torch.Tensor) -> torch.Tensor:
        """Where in `codes` and `values` the level nearest to half of `doubled` is, for torch.take; changes `doubled`."""
        return doubled.ceil_().clamp_(self.lowest, self.highest).long()


@lru_cache
def levels_of(levels: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Levels:
    return Levels(levels, dtype, device)
