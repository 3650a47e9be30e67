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
    mxfp4          17 bytes  exponent of d, 16 of nibbles (bit 3 is the sign)
    tq2_0          66 bytes  64 of 2-bit codes, d
    tq1_0          54 bytes  48 and 4 of codes in base 3, d
    iq3_s         110 bytes  d, 64 of entries' low bytes, 8 of their ninth bits, 32 of signs, 4 of scales' nibbles
    iq3_xxs        98 bytes  d, 64 of entries, 8 words of 32 bits: 4 signs of 7 bits, a scale
    iq2_s          82 bytes  d, 32 of entries' low bytes, 32 of signs, 8 of entries' high 2 bits, 8 of scales' nibbles
    iq2_xs         74 bytes  d, 32 words of 16 bits: an entry of 9 bits, a sign of 7; 8 of scales' nibbles
    iq2_xxs        66 bytes  d, 8 words of 64 bits: 4 entries of 8 bits, 4 signs of 7, a scale
    iq1_s          50 bytes  d, 32 of entries' low bytes, 8 words of 16 bits: 4 times 3 high bits, a scale of 3 bits, a shift
    iq1_m          56 bytes  32 of entries' low bytes, 16 of nibbles (3 high bits, a shift), 4 words of 16 bits: 4 scales of 3
                             bits, a nibble of d

In a field of b bits, numbers that are `run` apart share a byte. Byte j of a run holds numbers j, j + run, …
j + (8 / b - 1) * run, the first in the lowest bits. The next 8 / b * run numbers follow. The two nibbles of a byte are 16
apart in q4_0, 32 in q4_k and 64 in q6_k. With run 1, neighbours share a byte, as in q5_0's fifth bits.

A code is stored as level minus lowest level, and a scale as scale minus lowest scale. This includes q3_k's hmask, where the
C code reads a bit as "do not subtract 4". Only the int8 numbers of q8_0 and q6_k are in two's complement.

A "sign" is the signs of 8 columns, a bit for each, 1 for minus. Where it has 7 bits, the last sign makes the number of minus
signs even. A shift is 1 if it is downwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from llmc.formats import codebooks
from llmc.formats.types import BlockTensor, BlockType, Range

BYTE = np.dtype(np.uint8)
# {part: its numbers, uint8 [blocks, count]; uint16 for entries}. codes; scales (a block's scales, then its minimums); d and
# m, as bytes; quarters (d as four nibbles, the lowest first); entries, signs and shifts of a codebook
Parts = dict[str, np.ndarray]


class Field(Protocol):
    """A run of bytes in a block."""

    def write(self, parts: Parts) -> np.ndarray:
        """The bytes, uint8 [blocks, n]."""

    def read(self, raw: np.ndarray, counts: dict[str, int]) -> tuple[int, Parts]:
        """(n, the bits that the first n bytes of raw uint8 [blocks, at least n] hold, at their places in the numbers).
        counts: numbers of a block, by part."""


@dataclass(frozen=True)
class Bits:
    """A field: `bits` bits of every number of a part, from bit `low` up. Numbers that are `run` apart share a byte."""

    part: str
    bits: int = 8
    run: int = 1
    low: int = 0
    flip: int = 0  # 0x80: offset binary <-> two's complement

    def write(self, parts: Parts) -> np.ndarray:
        return self.pack(parts[self.part])

    def read(self, raw: np.ndarray, counts: dict[str, int]) -> tuple[int, Parts]:
        size = counts[self.part] * self.bits // 8
        return size, {self.part: self.unpack(raw[:, :size])}

    def pack(self, numbers: np.ndarray) -> np.ndarray:
        """[n, count] -> uint8 [n, count * bits / 8]."""
        wanted = (numbers >> self.low & (1 << self.bits) - 1 ^ self.flip).astype(BYTE, copy=False)
        fields = wanted.reshape(-1, 8 // self.bits, self.run)
        packed = fields[:, 0]
        for i in range(1, fields.shape[1]):
            packed |= fields[:, i] << i * self.bits
        return packed.reshape(len(numbers), -1)

    def unpack(self, raw: np.ndarray) -> np.ndarray:
        """uint8 [n, count * bits / 8] -> [n, count], the bits at their position in the numbers."""
        packed = raw.reshape(-1, 1, self.run)
        shifts = np.arange(0, 8, self.bits, dtype=BYTE)[:, None]
        found = packed >> shifts & (1 << self.bits) - 1 ^ self.flip
        wide = found.astype(np.uint16) if self.low + self.bits > 8 else found
        return (wide << self.low).reshape(len(raw), -1)


@dataclass(frozen=True)
class Sixes:
    """The 6-bit scales s and minimums m of q4_k and q5_k, in 12 bytes (j = 0 … 3):

    byte j      s[j]      and above it the high 2 bits of s[j + 4]
    byte j + 4  m[j]      and above it the high 2 bits of m[j + 4]
    byte j + 8  the low nibbles of s[j + 4] and, above it, m[j + 4]
    """

    def write(self, parts: Parts) -> np.ndarray:
        """uint8 [n, 16] (8 scales, 8 minimums) -> [n, 12]."""
        halves = parts["scales"].reshape(-1, 2, 2, 4)  # scale or minimum, first or last four
        first, last = halves[:, :, 0].reshape(-1, 8), halves[:, :, 1].reshape(-1, 8)
        return np.concatenate([first | last >> 4 << 6, NIBBLES_4_APART.pack(last)], axis=1)

    def read(self, raw: np.ndarray, counts: dict[str, int]) -> tuple[int, Parts]:
        """uint8 [n, 12] -> [n, 16]."""
        raw = raw[:, :12]
        first, last = raw[:, :8] & 0x3F, raw[:, :8] >> 6 << 4 | NIBBLES_4_APART.unpack(raw[:, 8:])
        return 12, {"scales": np.stack([first.reshape(-1, 2, 4), last.reshape(-1, 2, 4)], axis=2).reshape(-1, 16)}


@dataclass(frozen=True)
class Floats4:
    """The codes of mxfp4, 4 bits with a sign bit, 16 apart. Code 7 is the lesser zero, which the file calls -0."""

    def write(self, parts: Parts) -> np.ndarray:
        codes = parts["codes"]
        return NIBBLES_16.pack(np.where(codes < 8, codes ^ 15, codes ^ 8))

    def read(self, raw: np.ndarray, counts: dict[str, int]) -> tuple[int, Parts]:
        size, parts = NIBBLES_16.read(raw, counts)
        stored = parts["codes"]
        return size, {"codes": np.where(stored < 8, stored ^ 8, stored ^ 15)}


@dataclass(frozen=True)
class Trits:
    """The codes of tq1_0 in base 3. Five share a byte, 32 apart in the first 160 and 16 apart in the next 80, and four do, 4
    apart, in the last 16. The first has the highest place. A byte is the number's share of 3^5, rounded up, of 256: so that
    times three, the bits above the byte are the first code."""

    def write(self, parts: Parts) -> np.ndarray:
        codes = parts["codes"]
        places = np.array([81, 27, 9, 3, 1], np.uint16)[:, None]
        runs = [codes[:, start:end].reshape(len(codes), -1, run) for start, end, run in TRITS]
        numbers = np.concatenate([(r * places[: r.shape[1]]).sum(1, dtype=np.uint16) for r in runs], axis=1)
        return ((numbers.astype(np.uint32) * 256 + 242) // 243).astype(BYTE)

    def read(self, raw: np.ndarray, counts: dict[str, int]) -> tuple[int, Parts]:
        powers = np.array([1, 3, 9, 27, 81], BYTE)[:, None]
        parts, at = [], 0
        for start, end, run in TRITS:
            shifted = raw[:, None, at : at + run] * powers[: (end - start) // run]  # modulo 256
            parts.append((shifted.astype(np.uint16) * 3 >> 8).astype(BYTE).reshape(len(raw), -1))
            at += run
        return at, {"codes": np.concatenate(parts, axis=1)}


TRITS = ((0, 160, 32), (160, 240, 16), (240, 256, 4))  # first code, last code, bytes


@dataclass(frozen=True)
class Words:
    """Little-endian words of `size` bytes. Each holds the next numbers of some parts, from the lowest bit up.

    slots: (part, bits, from which bit of the number), in the order in which they lie in a word."""

    size: int
    slots: tuple[tuple[str, int, int], ...]

    def write(self, parts: Parts) -> np.ndarray:
        per = self._per()
        words, at, taken = None, 0, dict.fromkeys(per, 0)
        for part, bits, low in self.slots:
            numbers = parts[part].reshape(len(parts[part]), -1, per[part])[:, :, taken[part]].astype(np.uint64)
            found = (numbers >> np.uint64(low) & np.uint64((1 << bits) - 1)) << np.uint64(at)
            words = found if words is None else words | found
            at, taken[part] = at + bits, taken[part] + 1
        assert words is not None
        return np.ascontiguousarray(words.astype(f"<u{self.size}")).view(BYTE)

    def read(self, raw: np.ndarray, counts: dict[str, int]) -> tuple[int, Parts]:
        per = self._per()
        first = self.slots[0][0]
        total = counts[first] // per[first] * self.size
        words = np.ascontiguousarray(raw[:, :total]).view(f"<u{self.size}").astype(np.uint64)
        found: dict[str, list[np.ndarray]] = {part: [] for part in per}
        at = 0
        for part, bits, low in self.slots:
            numbers = (words >> np.uint64(at) & np.uint64((1 << bits) - 1)) << np.uint64(low)
            found[part].append(numbers.astype(np.uint16 if low + bits > 8 else BYTE))
            at += bits
        return total, {part: np.stack(numbers, axis=2).reshape(len(raw), -1) for part, numbers in found.items()}

    def _per(self) -> dict[str, int]:
        """{part: its numbers in a word}."""
        parts = [part for part, _, _ in self.slots]
        return {part: parts.count(part) for part in parts}


NIBBLES_4_APART = Bits("scales", 4, run=4)
D, M = Bits("d"), Bits("m")
NIBBLES_16, NIBBLES_32, NIBBLES_64 = (Bits("codes", 4, run) for run in (16, 32, 64))
PAIRS = Bits("codes", 2, run=32)
FIFTH_BITS = Bits("codes", 1, run=1, low=4)  # a little-endian uint32: bit i belongs to weight i

ENTRIES, SIGNS, SCALES = Bits("entries"), Bits("signs"), Bits("scales", 4, run=1)
FOUR_SIGNS_AND_A_SCALE = (*[("signs", 7, 0)] * 4, ("scales", 4, 0))

LAYOUTS: dict[str, tuple[Field, ...]] = {
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
    "iq4_xs": (D, Bits("scales", 2, run=1, low=4), SCALES, NIBBLES_16),
    "iq3_s": (D, ENTRIES, Bits("entries", 1, run=1, low=8), SIGNS, SCALES),
    "iq3_xxs": (D, ENTRIES, Words(4, FOUR_SIGNS_AND_A_SCALE)),
    "iq2_s": (D, ENTRIES, SIGNS, Bits("entries", 2, run=1, low=8), SCALES),
    "iq2_xs": (D, Words(2, (("entries", 9, 0), ("signs", 7, 0))), SCALES),
    "iq2_xxs": (D, Words(8, (*[("entries", 8, 0)] * 4, *FOUR_SIGNS_AND_A_SCALE))),
    "iq1_s": (D, ENTRIES, Words(2, (*[("entries", 3, 8)] * 4, ("scales", 3, 0), ("shifts", 1, 0)))),
    "iq1_m": (ENTRIES, Words(1, (("entries", 3, 8), ("shifts", 1, 0)) * 2),
              Words(2, (*[("scales", 3, 0)] * 4, ("quarters", 4, 0)))),
    "mxfp4": (D, Floats4()),
    "tq2_0": (PAIRS, D),
    "tq1_0": (Trits(), D),
}


def pack(t: BlockTensor) -> np.ndarray:
    """The blocks as bytes, uint8 [out, in / block * block_bytes]. No code and no factor changes. Raises ValueError if a
    number is outside the range of the format, or if codes are no entry of the codebook."""
    qtype = t.type
    codes = _unsigned(t.codes, (0, len(qtype.levels) - 1), qtype.block)
    parts = {"d": _exponents(t.d) if qtype.exponent else _as_bytes(t.d)}
    parts |= {"codes": codes} if qtype.codebook is None else codebooks.entries_of(codes, qtype)
    if t.m is not None:
        parts["m"] = _as_bytes(t.m)
    integers = [_unsigned(x, allowed, qtype.groups, step)
                for x, allowed, step in ((t.scales, qtype.scale_range, qtype.scale_step), (t.mins, qtype.min_range, 1))
                if x is not None and allowed is not None]
    if integers:
        parts["scales"] = np.concatenate(integers, axis=1)
    if qtype.name == "iq1_m":  # the only one whose d is not in one place
        parts["quarters"] = Bits("quarters", 4).unpack(parts["d"])
    return np.concatenate([f.write(parts) for f in LAYOUTS[qtype.name]], axis=1).reshape(t.shape[0], -1)


def unpack(data: np.ndarray, qtype: BlockType) -> BlockTensor:
    """The inverse of `pack`; scales and mins are int8. Raises ValueError for codes that the type does not have."""
    blocks = data.reshape(-1, qtype.block_bytes)
    kinds = (qtype.scale_range is not None) + (qtype.min_range is not None)
    counts = {"codes": qtype.block, "scales": kinds * qtype.groups, "d": 1 if qtype.exponent else 2, "m": 2, "quarters": 4}
    if qtype.codebook is not None:
        counts |= codebooks.counts(qtype)
    parts: Parts = {}
    start = 0
    for f in LAYOUTS[qtype.name]:
        size, found = f.read(blocks[:, start:], counts)
        for part, numbers in found.items():
            parts[part] = parts[part] | numbers if part in parts else numbers
        start += size
    assert start == qtype.block_bytes
    if "quarters" in parts:
        parts["d"] = Bits("quarters", 4).pack(parts["quarters"])
    codes = parts["codes"] if qtype.codebook is None else codebooks.codes_of(parts, qtype)
    if len(codes) and int(codes.max()) >= len(qtype.levels):
        raise ValueError(f"a code {int(codes.max())}, and {qtype.name} has the codes 0 … {len(qtype.levels) - 1}")

    def matrix(x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).view(data.shape[0], -1)

    def integers(index: int, allowed: Range | None, step: int = 1) -> torch.Tensor | None:
        if allowed is None:
            return None
        stored = parts["scales"][:, index * qtype.groups : (index + 1) * qtype.groups]
        return matrix((stored.astype(np.int16) * step + allowed[0]).astype(np.int8))

    return BlockTensor(
        qtype,
        codes=matrix(codes),
        d=matrix(np.ldexp(np.float32(1), parts["d"].astype(np.int32) - LEAST) if qtype.exponent
                 else np.ascontiguousarray(parts["d"]).view(np.float16)),
        m=matrix(parts["m"].view(np.float16)) if qtype.has_min else None,
        scales=integers(0, qtype.scale_range, qtype.scale_step),
        mins=integers(1, qtype.min_range),
    )


def _unsigned(x: torch.Tensor, allowed: Range, count: int, step: int = 1) -> np.ndarray:
    """Integers [out, n] minus the lowest allowed, over step -> uint8 [blocks, count]. Raises ValueError for one that is not
    allowed."""
    low, high = allowed
    least, most = (int(v) for v in x.aminmax())
    if least < low or most > high:
        raise ValueError(f"integers {least} … {most} are outside the range of the format, {low} … {high}")
    offset = x if low == 0 else x.to(torch.int16) - low
    if step > 1:
        if bool((offset % step).any()):
            raise ValueError(f"integers are not {low}, {low + step}, … {high}, as the format has them")
        offset = offset // step
    return offset.to(torch.uint8).numpy().reshape(-1, count)


def _as_bytes(half: torch.Tensor) -> np.ndarray:
    """float16 [out, in / block] -> uint8 [blocks, 2]."""
    return np.ascontiguousarray(half.numpy()).view(BYTE).reshape(-1, 2)


LEAST = 128  # the exponent of E8M0's least power of two. d is half of E8M0's value, because the levels are doubled


def _exponents(d: torch.Tensor) -> np.ndarray:
    """Powers of two, float32 [out, in / block] -> uint8 [blocks, 1]. Raises ValueError for other numbers."""
    mantissa, exponent = np.frexp(d.numpy())
    stored = exponent.astype(np.int32) - 1 + LEAST
    if not ((mantissa == 0.5) & (stored >= 0) & (stored <= 255)).all():
        raise ValueError(f"factors are not powers of two from 2^-{LEAST} to 2^{255 - LEAST}")
    return stored.astype(BYTE).reshape(-1, 1)
