"""The one table of quantisation grids: what values a weight may take, and which file formats hold them exactly.

A grid cuts each row of a weight matrix [out, in] into blocks of `group_size` consecutive columns. Inside a block

    value = scale * (code - zero)        code in 0 … 2**bits - 1, scale stored as fp16

so the codes that a quantiser chooses can be carried, bit for bit, into every format the table names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Grid:
    """Values `scale * (code - zero)`. Symmetric grids fix zero at 2**(bits-1): 8 for 4 bits, 128 for 8 bits."""

    bits: int
    group_size: int
    symmetric: bool = True

    @property
    def name(self) -> str:
        return f"int{self.bits}-{'sym' if self.symmetric else 'asym'}-g{self.group_size}"

    @property
    def zero(self) -> int:
        """The zero point of a symmetric grid."""
        return 1 << (self.bits - 1)

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1

    @property
    def holds_zero(self) -> bool:
        """Whether the value 0 has a code in every group: here the zero point is one."""
        return True

    @property
    def bits_per_weight(self) -> float:
        """Codes plus fp16 scale (plus a packed zero point when asymmetric)."""
        return self.bits + (16 + (0 if self.symmetric else self.bits)) / self.group_size

    @property
    def gguf_type(self) -> str | None:
        """The GGUF tensor type that holds this grid exactly (the scale repeated every 32 columns), or None."""
        if not self.symmetric or self.group_size % 32:
            return None
        return {4: "Q4_0", 8: "Q8_0"}.get(self.bits)


@dataclass
class QuantizedTensor:
    """A weight matrix on a grid.

    codes:  uint8 [out, in], each 0 … 2**bits - 1
    scales: float16 [out, in / group_size]
    zeros:  uint8 [out, in / group_size], or None for a symmetric grid
    """

    grid: Grid
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> torch.Tensor:
        """float32 [out, in]: scale * (code - zero), exact in float32 for every grid of the table."""
        import torch

        out, n = self.codes.shape
        q = self.codes.to(torch.float32).view(out, -1, self.grid.group_size)
        zero = float(self.grid.zero) if self.zeros is None else self.zeros.to(torch.float32).unsqueeze(-1)
        return ((q - zero) * self.scales.to(torch.float32).unsqueeze(-1)).view(out, n)
