"""The entries of codebooks: which codes stand side by side in a row of an IQ1, IQ2 or IQ3 type.

The tables are those of the package gguf. A level is split in two: its digit, which entries consist of, and its side.

    with signs      digit: the number of the magnitude   side: 1 for minus
    with a shift    digit: 0, 1, 2 for -1, 0, 1          side: 1 for downwards
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from llmc.errors import UserError
from llmc.formats.types import BlockType, Codebook


@dataclass(frozen=True)
class Table:
    """digits: uint8 [entries, size]. numbers: int16, the entry of each key of digits (`keys`); -1 if there is none."""

    digits: np.ndarray
    numbers: np.ndarray
    kinds: int  # of digits

    def keys(self, digits: np.ndarray) -> np.ndarray:
        """int64 [...] of digits [..., size]: the number that they are in base `kinds`."""
        return np.asarray(digits @ self.kinds ** np.arange(self.digits.shape[1], dtype=np.int64))


def book(qtype: BlockType) -> Codebook:
    """The codebook of a type that has one."""
    assert qtype.codebook is not None
    return qtype.codebook


def kinds(qtype: BlockType) -> int:
    """The number of digits."""
    return len(qtype.levels) // 2


def code(digit: np.ndarray, side: np.ndarray, qtype: BlockType) -> np.ndarray:
    """The codes of digits and sides; shapes broadcast."""
    if book(qtype).signs:
        return np.where(side, kinds(qtype) - 1 - digit, kinds(qtype) + digit).astype(np.uint8)
    return (2 * digit + 1 - side).astype(np.uint8)


@lru_cache
def table(qtype: BlockType) -> Table:
    """The entries of a type. UserError if the package gguf is missing or does not know the type."""
    try:
        from gguf import quants
    except ImportError as e:
        raise UserError(f"{qtype.name} has a table of entries, which is in the package gguf",
                        "pip install 'llmc-toolkit[gguf]'") from e
    reader = getattr(quants, qtype.gguf_type, None)
    if reader is None:
        raise UserError(f"the package gguf does not know {qtype.gguf_type}", "pip install --upgrade gguf")
    reader.init_grid()
    values = np.asarray(reader.grid).reshape(reader.grid_shape)
    digits = np.searchsorted(np.unique(values), values).astype(np.uint8)
    found = Table(digits, np.full(kinds(qtype) ** digits.shape[1], -1, np.int16), kinds(qtype))
    found.numbers[found.keys(digits)] = np.arange(len(digits))
    return found


def counts(qtype: BlockType) -> dict[str, int]:
    """{part: its numbers in a block}: entries, and signs or shifts."""
    c = book(qtype)
    return {"entries": qtype.block // c.size,
            **({"signs": qtype.block // 8} if c.signs else {"shifts": qtype.block // c.shared})}


def entries_of(codes: np.ndarray, qtype: BlockType) -> dict[str, np.ndarray]:
    """codes uint8 [blocks, block] -> {entries: uint16; signs or shifts: uint8}. Raises ValueError for codes that have no
    place in the file."""
    c, n, t = book(qtype), kinds(qtype), table(qtype)
    side = (codes < n).astype(np.uint8) if c.signs else 1 - (codes & 1)
    digit = np.where(side, n - 1 - codes, codes - n) if c.signs else codes >> 1
    entries = t.numbers[t.keys(digit.reshape(len(codes), -1, c.size))]
    if len(entries) and int(entries.min()) < 0:
        raise ValueError(f"{c.size} codes in a row are no entry of {qtype.name}")
    found = {"entries": entries.astype(np.uint16)}
    if c.signs:
        bits = np.packbits(side.reshape(len(codes), -1, 8), axis=-1, bitorder="little")[..., 0]
        if c.signs == 7 and not np.array_equal(parity(bits & 127), bits >> 7):
            raise ValueError(f"8 codes in a row have an odd number of minus signs, which {qtype.name} cannot store")
        return {**found, "signs": bits}
    shifts = side.reshape(len(codes), -1, c.shared)
    if not (shifts == shifts[..., :1]).all():
        raise ValueError(f"{c.shared} codes in a row are shifted in both directions, which {qtype.name} cannot store")
    return {**found, "shifts": shifts[..., 0]}


def codes_of(parts: dict[str, np.ndarray], qtype: BlockType) -> np.ndarray:
    """The inverse of `entries_of`. Of signs with 7 bits the last is made."""
    c = book(qtype)
    digit = table(qtype).digits[parts["entries"]].reshape(len(parts["entries"]), -1)
    if c.signs:
        bits = parts["signs"] if c.signs == 8 else parts["signs"] | parity(parts["signs"]) << 7
        side = np.unpackbits(bits[..., None], axis=-1, bitorder="little").reshape(digit.shape)
    else:
        side = np.repeat(parts["shifts"], c.shared, axis=1)
    return code(digit, side, qtype)


def parity(bits: np.ndarray) -> np.ndarray:
    """1 where the number of ones in uint8 is odd."""
    folded = bits ^ bits >> 4
    folded = folded ^ folded >> 2
    return np.asarray((folded ^ folded >> 1) & 1, dtype=np.uint8)
