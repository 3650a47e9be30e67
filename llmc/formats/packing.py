"""The bytes of block types: BlockTensor -> GGUF blocks and back, without rounding. Formats: ggml/src/ggml-common.h.

A block is a sequence of fields, listed here in file order ("16 of nibbles" is 16 bytes of 4-bit numbers). Numbers are
little-endian; d, m and dmin are float16:

    q4_0, iq4_nl   18 bytes  d, 16 of nibbles
    q4_1           20 bytes  d, m, 16 of nibbles
    q5_0           22 bytes  d, 4 of fifth bits, 16 of nibbles
    q5_1           24 bytes  d, m, 4 of fifth bits, 16 of nibbles
    q8_0           34 bytes  d, 32 int8
    q2_k           84 bytes  16 of (scale, minimum) nibbles, 64 of 2-bit codes, d, dmin
    q3_k          110 bytes  32 of third bits, 64 of low 2 bits, 8 of scales' nibbles, 4 of their high bits, d
    q4_k          144 bytes  d, dmin, 12 of 6-bit scales and minimums, 128 of nibbles
    q5_k          176 bytes  d, dmin, 12 of 6-bit scales and minimums, 32 of fifth bits, 128 of nibbles
    q6_k          210 bytes  128 of nibbles, 64 of high 2 bits, 16 int8 scales, d
    iq4_xs        136 bytes  d, 2 of scales' high bits, 4 of their nibbles, 128 of nibbles

In a field of b bits, numbers that are `run` apart share a byte. Byte j of a run holds numbers j, j + run, …
j + (8 / b - 1) * run, the first in the lowest bits. The next 8 / b * run numbers follow. The two nibbles of a byte are 16
apart in q4_0, 32 in q4_k and 64 in q6_k. With run 1, neighbours share a byte, as in q5_0's fifth bits.

A code is stored as level minus lowest level, and a scale as scale minus lowest scale. This includes q3_k's hmask, where the
C code reads a bit as "do not subtract 4". Only the int8 numbers of q8_0 and q6_k are in two's complement.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from llmc.formats.types import BlockTensor, BlockType, Range

BYTE = np.dtype(np.uint8)


@dataclass(frozen=True)
class Bits:
    """A field: `bits` bits of every number of a part, from bit `low` up. Numbers that are `run` apart share a byte."""

    part: str  # codes | scales (a block's scales, then its minimums) | d | m
    bits: int = 8
    run: int = 1
    low: int = 0
    flip: int = 0  # 0x80: offset binary <-> two's complement

    def write(self, numbers: np.ndarray) -> np.ndarray:
        """uint8 [n, count] -> [n, count * bits / 8]."""
        fields = (numbers >> self.low & (1 << self.bits) - 1 ^ self.flip).reshape(-1, 8 // self.bits, self.run)
        packed = fields[:, 0]
        for i in range(1, fields.shape[1]):
            packed |= fields[:, i] << i * self.bits
        return packed.reshape(len(numbers), -1)

    def read(self, raw: np.ndarray) -> np.ndarray:
        """uint8 [n, count * bits / 8] -> [n, count], the bits at their position in the numbers."""
        packed = raw.reshape(-1, 1, self.run)
        shifts = np.arange(0, 8, self.bits, dtype=BYTE)[:, None]
        return ((packed >> shifts & (1 << self.bits) - 1 ^ self.flip) << self.low).reshape(len(raw), -1)


@dataclass(frozen=True)
class Sixes:
    """The 6-bit scales s and minimums m of q4_k and q5_k, in 12 bytes (j = 0 … 3):

    byte j      s[j]      and above it the high 2 bits of s[j + 4]
    byte j + 4  m[j]      and above it the high 2 bits of m[j + 4]
    byte j + 8  the low nibbles of s[j + 4] and, above it, m[j + 4]
    """

    part: str = "scales"
    bits: int = 6

    def write(self, numbers: np.ndarray) -> np.ndarray:
        """uint8 [n, 16] (8 scales, 8 minimums) -> [n, 12]."""
        halves = numbers.reshape(-1, 2, 2, 4)  # scale or minimum, first or last four
        first, last = halves[:, :, 0].reshape(-1, 8), halves[:, :, 1].reshape(-1, 8)
        return np.concatenate([first | last >> 4 << 6, NIBBLES_4_APART.write(last)], axis=1)

    def read(self, raw: np.ndarray) -> np.ndarray:
        """uint8 [n, 12] -> [n, 16]."""
        first, last = raw[:, :8] & 0x3F, raw[:, :8] >> 6 << 4 | NIBBLES_4_APART.read(raw[:, 8:])
        return np.stack([first.reshape(-1, 2, 4), last.reshape(-1, 2, 4)], axis=2).reshape(-1, 16)


NIBBLES_4_APART = Bits("scales", 4, run=4)
D, M = Bits("d"), Bits("m")
NIBBLES_16, NIBBLES_32, NIBBLES_64 = (Bits("codes", 4, run) for run in (16, 32, 64))
PAIRS = Bits("codes", 2, run=32)
FIFTH_BITS = Bits("codes", 1, run=1, low=4)  # a little-endian uint32: bit i belongs to weight i

LAYOUTS: dict[str, tuple[Bits | Sixes, ...]] = {
    "q4_0": (D, NIBBLES_16),
    "q4_1": (D, M, NIBBLES_16),
    "q5_0": (D, FIFTH_BITS, NIBBLES_16),
    "q5_1": (D, M, FIFTH_BITS, NIBBLES_16),
    "q8_0": (D, Bits("codes", flip=0x80)),
    "iq4_nl": (D, NIBBLES_16),
    "q2_k": (Bits("scales", 4, run=16), PAIRS, D, M),
    "q3_k": (Bits("codes", 1, run=32, low=2), PAIRS, Bits("scales", 4, run=8), Bits("scales", 2, run=4, low=4), D),
    "q4_k": (D, M, Sixes(), NIBBLES_32),
    "q5_k": (D, M, Sixes(), Bits("codes", 1, run=32, low=4), NIBBLES_32),
    "q6_k": (NIBBLES_64, Bits("codes", 2, run=32, low=4), Bits("scales", flip=0x80), D),
    "iq4_xs": (D, Bits("scales", 2, run=1, low=4), Bits("scales", 4, run=1), NIBBLES_16),
}


def pack(t: BlockTensor) -> np.ndarray:
    """The blocks as bytes, uint8 [out, in / block * block_bytes]. No code and no factor changes."""
    qtype = t.type
    parts = {"codes": _unsigned(t.codes, (0, len(qtype.levels) - 1), qtype.block), "d": _as_bytes(t.d)}
    if t.m is not None:
        parts["m"] = _as_bytes(t.m)
    integers = [_unsigned(x, allowed, qtype.groups)
                for x, allowed in ((t.scales, qtype.scale_range), (t.mins, qtype.min_range))
                if x is not None and allowed is not None]
    if integers:
        parts["scales"] = np.concatenate(integers, axis=1)
    return np.concatenate([f.write(parts[f.part]) for f in LAYOUTS[qtype.name]], axis=1).reshape(t.shape[0], -1)


def unpack(data: np.ndarray, qtype: BlockType) -> BlockTensor:
    """The inverse of `pack`; scales and mins are int8."""
    blocks = data.reshape(-1, qtype.block_bytes)
    kinds = (qtype.scale_range is not None) + (qtype.min_range is not None)
    counts = {"codes": qtype.block, "scales": kinds * qtype.groups, "d": 2, "m": 2}
    parts: dict[str, np.ndarray] = {}
    start = 0
    for f in LAYOUTS[qtype.name]:
        end = start + counts[f.part] * f.bits // 8
        numbers = f.read(blocks[:, start:end])
        parts[f.part] = parts[f.part] | numbers if f.part in parts else numbers
        start = end

    def matrix(x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).view(data.shape[0], -1)

    def integers(index: int, allowed: Range | None) -> torch.Tensor | None:
        if allowed is None:
            return None
        stored = parts["scales"][:, index * qtype.groups : (index + 1) * qtype.groups]
        return matrix((stored.astype(np.int16) + allowed[0]).astype(np.int8))

    return BlockTensor(
        qtype,
        codes=matrix(parts["codes"]),
        d=matrix(parts["d"].view(np.float16)),
        m=matrix(parts["m"].view(np.float16)) if qtype.has_min else None,
        scales=integers(0, qtype.scale_range),
        mins=integers(1, qtype.min_range),
    )


def _unsigned(x: torch.Tensor, allowed: Range, count: int) -> np.ndarray:
    """Integers [out, n] minus the lowest allowed -> uint8 [blocks, count]. Raises ValueError for one outside the range."""
    low, high = allowed
    least, most = (int(v) for v in x.aminmax())
    if least < low or most > high:
        raise ValueError(f"integers {least} … {most} are outside the range of the format, {low} … {high}")
    offset = x if low == 0 else x.to(torch.int16) - low
    return offset.to(torch.uint8).numpy().reshape(-1, count)


def _as_bytes(half: torch.Tensor) -> np.ndarray:
    """float16 [out, in / block] -> uint8 [blocks, 2]."""
    return np.ascontiguousarray(half.numpy()).view(BYTE).reshape(-1, 2)
