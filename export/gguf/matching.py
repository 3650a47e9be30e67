"""Finds where the converter put the rows and columns of matrices, by their float32 values.

It may permute, fuse, split or stack matrices and experts. Nothing here depends on names.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np


def digests(pieces: np.ndarray) -> np.ndarray:
    """Two uint64 for each piece. pieces: float32 [n, width]. Equal values have equal digests, also 0.0 and -0.0."""
    whole = np.ascontiguousarray(pieces + np.float32(0))  # -0.0 becomes 0.0
    raw: Any = memoryview(whole).cast("B")  # type: ignore[arg-type]
    size = whole.shape[1] * 4
    found = b"".join(hashlib.blake2b(raw[i : i + size], digest_size=16).digest() for i in range(0, len(raw), size))
    return np.frombuffer(found, np.uint64).reshape(-1, 2)


class Index:
    """Pieces of one width, whole rows or blocks of columns, of numbered matrices. Add all of them before the first search."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []
        self._matrices: list[int] = []
        self._ready = False

    def add(self, matrix: int, keys: np.ndarray) -> None:
        """matrix: any number, each once. keys: the digests of its pieces, in their order."""
        assert not self._ready
        self._parts.append(keys)
        self._matrices.append(matrix)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """(matrix, number of its piece) for each digest, int64 [n, 2]; -1 for unknown ones.

        Of equal pieces, those that are not placed yet come first, each once; if there are too few, the last one repeats."""
        self._sort()
        low, high = (np.searchsorted(self._keys, keys[:, 0], side) for side in ("left", "right"))
        at = np.minimum(low, max(0, len(self._keys) - 1))
        known = high > low
        known[known] = self._check[at[known]] == keys[known, 1]
        several = np.flatnonzero(known & (high - low > 1))
        for start in np.unique(low[several]):
            asked = several[low[several] == start]
            equal = np.arange(start, high[asked[0]])
            fresh = np.array([not self._placed[int(m)][i] for m, i in self._places[equal]])
            equal = np.concatenate([equal[fresh], equal[~fresh][-1:]])
            at[asked] = equal[np.minimum(np.arange(len(asked)), len(equal) - 1)]
        found = np.full((len(keys), 2), -1, np.int64)
        found[known] = self._places[at[known]]
        return found

    def place(self, found: np.ndarray) -> None:
        """Note that the pieces of a search are in the file."""
        for matrix in np.unique(found[:, 0]):
            self._placed[int(matrix)][found[found[:, 0] == matrix, 1]] = True

    def left(self) -> dict[int, np.ndarray]:
        """The numbers of the pieces that were not placed, by matrix."""
        self._sort()
        return {m: np.flatnonzero(~placed) for m, placed in self._placed.items() if not placed.all()}

    def _sort(self) -> None:
        if self._ready:
            return
        self._ready = True
        counts = [len(p) for p in self._parts]
        keys = np.concatenate([np.empty((0, 2), np.uint64), *self._parts])
        numbers = np.concatenate([np.empty(0, np.int64), *map(np.arange, counts)])
        places = np.stack([np.repeat(np.array(self._matrices, np.int64), counts), numbers], axis=1)
        order = np.argsort(keys[:, 0], kind="stable")
        self._keys, self._check, self._places = keys[order, 0], keys[order, 1], places[order]
        self._placed = {m: np.zeros(n, bool) for m, n in zip(self._matrices, counts, strict=True)}
        self._parts.clear()


def evidence(pieces: np.ndarray, known: np.ndarray) -> str:
    """'all', 'some' or 'none' of the pieces are known. Pieces of zeros prove nothing."""
    if not known[pieces.any(axis=1)].any():
        return "none"
    return "all" if known.all() else "some"
