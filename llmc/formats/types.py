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
# Formats: ggml/src/ggml-common.h and ggml-quants.c of llama.cpp.

Range = tuple[int, int]  # lowest and highest, both included


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

    @property
    def gguf_type(self) -> str:
        return self.name.upper()

    @property
    def uniform(self) -> bool:
        """Whether the levels are consecutive integers."""
        return self.levels == tuple(range(self.levels[0], self.levels[-1] + 1))

    @property
    def holds_zero(self) -> bool:
        """Whether the value 0 has a code in every group. False for types with a minimum and for the iq4 types."""
        return 0 in self.levels and not self.has_min

    @property
    def groups(self) -> int:
        """Groups in a block."""
        return self.block // self.group

    @property
    def block_bytes(self) -> int:
        """Bytes of a block: codes, the groups' integers and the fp16 factors. No type has padding."""
        integers = sum((high - low).bit_length() for low, high in filter(None, (self.scale_range, self.min_range)))
        bits = self.block * (len(self.levels) - 1).bit_length() + self.groups * integers + 16 * (1 + self.has_min)
        return bits // 8

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block


def _integers(low: int, high: int) -> tuple[int, ...]:
    return tuple(range(low, high + 1))


# ggml's kvalues_iq4nl: denser near zero, as weights are
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

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
    )
}


# types for rows that are not a multiple of 256: as in llama.cpp, but iq4_nl instead of q4_0, which is as large and loses more
FALLBACK = {"q2_k": "iq4_nl", "q3_k": "iq4_nl", "iq4_xs": "iq4_nl", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}


def type_named(name: str) -> BlockType:
    """The block type of that name. Raises UserError if there is none."""
    if name not in BLOCK_TYPES:
        raise UserError(f"no GGUF block type is named {name!r}", f"choose one of {', '.join(BLOCK_TYPES)}")
    return BLOCK_TYPES[name]


@dataclass
class BlockTensor:
    """A weight matrix of a block type.

    codes:  uint8 [out, in], indices into type.levels
    d:      float16 [out, in / block]
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
        """float32 [out, in / group]: d, or d * scale. Exact."""
        return self._times(self.d, self.scales)

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
