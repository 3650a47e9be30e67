"""The quantization types: the values that a weight may take, and the file formats that hold them exactly.

A type cuts each row of a weight matrix [out, in] into blocks of `group_size` consecutive columns. Inside a block

    value = scale * (code - zero)        code in 0 … 2**bits - 1, scale stored as fp16

The codes that a quantizer chooses can be copied bit for bit into every format that holds the type.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmc.errors import UserError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class IntegerType:
    """Values `scale * (code - zero)`. Symmetric types fix zero at 2**(bits-1): 8 for 4 bits, 128 for 8 bits."""

    bits: int
    group_size: int
    symmetric: bool = True

    @property
    def name(self) -> str:
        return f"int{self.bits}-{'sym' if self.symmetric else 'asym'}-g{self.group_size}"

    @property
    def zero(self) -> int:
        """The zero point of a symmetric type."""
        return 1 << (self.bits - 1)

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1

    @property
    def holds_zero(self) -> bool:
        """Whether the value 0 has a code in every group. Always true: it is the zero point."""
        return True

    @property
    def bits_per_weight(self) -> float:
        """Codes plus fp16 scale (plus a packed zero point when asymmetric)."""
        return self.bits + (16 + (0 if self.symmetric else self.bits)) / self.group_size

    @property
    def gguf_type(self) -> str | None:
        """The GGUF tensor type that holds this type exactly (the scale repeated every 32 columns), or None."""
        if not self.symmetric or self.group_size % 32:
            return None
        return {4: "Q4_0", 8: "Q8_0"}.get(self.bits)


@dataclass
class QuantizedTensor:
    """A weight matrix of an integer type.

    codes:  uint8 [out, in], each 0 … 2**bits - 1
    scales: float16 [out, in / group_size]
    zeros:  uint8 [out, in / group_size], or None for a symmetric type
    """

    type: IntegerType
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> torch.Tensor:
        """float32 [out, in]: scale * (code - zero), exact in float32 for every type."""
        import torch

        out, n = self.codes.shape
        q = self.codes.to(torch.float32).view(out, -1, self.type.group_size)
        zero = float(self.type.zero) if self.zeros is None else self.zeros.to(torch.float32).unsqueeze(-1)
        return ((q - zero) * self.scales.to(torch.float32).unsqueeze(-1)).view(out, n)


# -------------------------------------------------------------------------------------------------------------- GGUF's types
#
# The GGUF block types: the values that a weight may take, as codes and factors. llmc.formats.packing has their bytes.
#
# A type cuts each row of a matrix [out, in] into blocks of `block` columns that share fp16 factors, and each block into
# groups of `group` columns that share one scale and one minimum:
#
#     block = group:  value = d * level[code] + m
#     block > group:  value = (d * scale) * level[code] - (dmin * minimum)   scale, minimum: small integers of the group
#
# without the terms that a type lacks. All arithmetic is float32. Each product is exact (11 bits of d, at most 12 of scale
# times level), and only the last addition rounds. So a fused multiply-add in llama.cpp gives the same bits.
#
# Types with a codebook (IQ1 … IQ3) have levels and scales like the others. But not every run of codes has a place in the
# file: 8 or 4 columns in a row take one of the entries of a table. So their weights are a BlockTensor too, and all that reads
# one (dequantizing, healing, choosing rows) needs to know nothing of codebooks. Only the bytes (packing.py) and the choice of
# codes (llmc/rounding/codebook.py) do.
# Formats: ggml/src/ggml-common.h and ggml-quants.c of llama.cpp.

Range = tuple[int, int]  # lowest and highest, both included


@dataclass(frozen=True)
class Codebook:
    """Which runs of codes a type can store. The entries themselves are in the package gguf (llmc/formats/codebooks.py).

    With `signs`, an entry holds magnitudes. Without, it holds -1, 0 and 1, and `shared` columns are all shifted by one
    amount, up or down: a level is 8 * number ± 1.
    """

    size: int  # columns of an entry
    bits: int  # of the number of an entry
    signs: int = 0  # bits for the signs of 8 columns. With 7, the number of minus signs is even
    shared: int = 0  # columns with one sign of the shift; 0: no shift

    def stored(self, block: int) -> int:
        """The bits of the codes of `block` columns."""
        shifts = block // self.shared if self.shared else 0
        return block // self.size * self.bits + block // 8 * self.signs + shifts


@dataclass(frozen=True)
class BlockType:
    """One GGUF type. Its codes are 0 … len(levels) - 1, its scales and minimums integers within their ranges."""

    name: str
    block: int  # weights that share the fp16 factors
    group: int  # weights that share one effective scale and minimum
    levels: tuple[int, ...] = field(repr=False)  # the value of each code, ascending
    scale_range: Range | None = None  # None: the block has one scale, d itself
    min_range: Range | None = None
    has_min: bool = False
    scale_step: int = 1  # distance of two scales: 2 if only odd ones have a code
    unit: float = 1.0  # a power of two by which each scale is multiplied
    exponent: bool = False  # d is a power of two, stored as its exponent (E8M0), not float16
    code_bits: int | None = None  # the bits of a block's codes; None: whole bits for each, or as the codebook has them
    codebook: Codebook | None = None

    @property
    def gguf_type(self) -> str:
        return self.name.upper()

    @property
    def uniform(self) -> bool:
        """Whether the levels are consecutive integers."""
        return self.levels == tuple(range(self.levels[0], self.levels[-1] + 1))

    @property
    def holds_zero(self) -> bool:
        """Whether the value 0 has a code in every group. False for types with a minimum and for the iq types."""
        return 0 in self.levels and not self.has_min

    @property
    def groups(self) -> int:
        """Groups in a block."""
        return self.block // self.group

    @property
    def block_bytes(self) -> int:
        """Bytes of a block: codes, the groups' integers and the fp16 factors. No type has padding."""
        steps = (self.scale_range, self.scale_step), (self.min_range, 1)
        integers = sum(((allowed[1] - allowed[0]) // step).bit_length() for allowed, step in steps if allowed)
        codes = self.block * (len(self.levels) - 1).bit_length() if self.code_bits is None else self.code_bits
        if self.codebook is not None:
            codes = self.codebook.stored(self.block)
        return (codes + self.groups * integers + (8 if self.exponent else 16 * (1 + self.has_min))) // 8

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block


def _integers(low: int, high: int) -> tuple[int, ...]:
    return tuple(range(low, high + 1))


# ggml's kvalues_iq4nl: denser near zero, as weights are
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

# E2M1, doubled as in ggml's kvalues_mxfp4. There are two codes for 0
MXFP4_LEVELS = (-12, -8, -6, -4, -3, -2, -1, 0, 0, 1, 2, 3, 4, 6, 8, 12)


def _signed(*magnitudes: int) -> tuple[int, ...]:
    return (*(-m for m in reversed(magnitudes)), *magnitudes)


IQ2_LEVELS, IQ3_LEVELS, SHIFTED = _signed(8, 25, 43), _signed(4, 12, 20, 28, 36, 44, 52, 62), _signed(1, 7, 9)
ODD = (1, 31)  # 4 bits

BLOCK_TYPES: dict[str, BlockType] = {
    qtype.name: qtype
    for qtype in (
        BlockType("q4_0", 32, 32, _integers(-8, 7)),
        BlockType("q4_1", 32, 32, _integers(0, 15), has_min=True),
        BlockType("q5_0", 32, 32, _integers(-16, 15)),
        BlockType("q5_1", 32, 32, _integers(0, 31), has_min=True),
        BlockType("q8_0", 32, 32, _integers(-128, 127)),
        BlockType("iq4_nl", 32, 32, IQ4_LEVELS),
        BlockType("q2_k", 256, 16, _integers(0, 3), (0, 15), (0, 15), has_min=True),
        BlockType("q3_k", 256, 16, _integers(-4, 3), (-32, 31)),
        BlockType("q4_k", 256, 32, _integers(0, 15), (0, 63), (0, 63), has_min=True),
        BlockType("q5_k", 256, 32, _integers(0, 31), (0, 63), (0, 63), has_min=True),
        BlockType("q6_k", 256, 16, _integers(-32, 31), (-128, 127)),
        BlockType("iq4_xs", 256, 32, IQ4_LEVELS, (-32, 31)),
        BlockType("iq3_s", 256, 32, _signed(*range(1, 16, 2)), ODD, scale_step=2, codebook=Codebook(4, 9, signs=8)),
        BlockType("iq3_xxs", 256, 32, IQ3_LEVELS, ODD, scale_step=2, unit=1 / 4, codebook=Codebook(4, 8, signs=7)),
        BlockType("iq2_s", 256, 16, IQ2_LEVELS, ODD, scale_step=2, unit=1 / 8, codebook=Codebook(8, 10, signs=8)),
        BlockType("iq2_xs", 256, 16, IQ2_LEVELS, ODD, scale_step=2, unit=1 / 8, codebook=Codebook(8, 9, signs=7)),
        BlockType("iq2_xxs", 256, 32, IQ2_LEVELS, ODD, scale_step=2, unit=1 / 8, codebook=Codebook(8, 8, signs=7)),
        BlockType("iq1_m", 256, 16, SHIFTED, (1, 15), scale_step=2, unit=1 / 8, codebook=Codebook(8, 11, shared=8)),
        BlockType("iq1_s", 256, 32, SHIFTED, (1, 15), scale_step=2, unit=1 / 8, codebook=Codebook(8, 11, shared=32)),
        BlockType("mxfp4", 32, 32, MXFP4_LEVELS, exponent=True),
        BlockType("tq2_0", 256, 256, _integers(-1, 1)),
        BlockType("tq1_0", 256, 256, _integers(-1, 1), code_bits=8 * 52),  # five to a byte
    )
}


# types for rows that are not a multiple of 256: as in llama.cpp, but iq4_nl instead of q4_0, which is as large and loses more
FALLBACK = {**{name: "iq4_nl" for name, qtype in BLOCK_TYPES.items() if qtype.block == 256},
            "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}


def type_named(name: str) -> BlockType:
    """The block type of that name. Raises UserError if there is none."""
    if name not in BLOCK_TYPES:
        raise UserError(f"no GGUF block type is named {name!r}", f"choose one of {', '.join(BLOCK_TYPES)}")
    return BLOCK_TYPES[name]


@dataclass
class BlockTensor:
    """A weight matrix of a block type.

    codes:  uint8 [out, in], indices into type.levels
    d:      float16 [out, in / block]; float32 if type.exponent
    m:      float16 [out, in / block], None unless type.has_min: m if block = group, else dmin
    scales: int8 or int16 [out, in / group], None unless type.scale_range
    mins:   int8 or int16 [out, in / group], None unless type.min_range
    """

    type: BlockType
    codes: torch.Tensor
    d: torch.Tensor
    m: torch.Tensor | None = None
    scales: torch.Tensor | None = None
    mins: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def group_scales(self) -> torch.Tensor:
        """float32 [out, in / group]: d, or d * scale, times the unit. Exact."""
        scale = self._times(self.d, self.scales)
        return scale if self.type.unit == 1 else scale * self.type.unit

    def group_lows(self) -> torch.Tensor:
        """float32 [out, in / group], the term added to scale * level: m, or -(dmin * minimum), or zeros. Exact."""
        import torch

        if self.m is None:
            return torch.zeros(self.shape[0], self.shape[1] // self.type.group, device=self.codes.device)
        low = self._times(self.m, self.mins)
        return low if self.mins is None else -low

    def dequantize(self) -> torch.Tensor:
        """float32 [out, in]: scale * level[code] + low, bit for bit what llama.cpp computes."""
        import torch

        levels = torch.tensor(self.type.levels, dtype=torch.float32, device=self.codes.device)
        values = levels[self.codes.int()].view(self.shape[0], -1, self.type.group)
        values *= self.group_scales().unsqueeze(-1)
        if self.m is not None:  # for a type without a minimum, adding zeros would turn -0 into +0
            values += self.group_lows().unsqueeze(-1)
        return values.view(self.shape)

    def _times(self, factor: torch.Tensor, integers: torch.Tensor | None) -> torch.Tensor:
        """float16 [out, in / block] times integers [out, in / group] (None: ones) -> float32 [out, in / group]."""
        import torch

        wide = factor.to(torch.float32)
        if integers is None:
            return wide
        by_block = integers.to(torch.float32).view(*wide.shape, self.type.groups)
        return (wide.unsqueeze(-1) * by_block).view(integers.shape)


AnyType = IntegerType | BlockType
