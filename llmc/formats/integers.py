"""What the layouts of integer codes share (GPTQ, AWQ, compressed-tensors): words of 32 bits, and codes with their scales."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmc.errors import UserError
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.types import IntegerType, QuantizedTensor


@dataclass
class Integers:
    """A linear as it is stored. codes: uint8 [out, in].  scales: [out, groups], in the stored type.  zeros: uint8
    [out, groups]; None for a symmetric type."""

    type: IntegerType
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None

    def tensor(self) -> QuantizedTensor:
        """With scales in float16, as GGUF and ONNX hold them. See `rounded`."""
        return QuantizedTensor(self.type, self.codes, self.scales.to(torch.float16), self.zeros)

    def dequantize(self, order: torch.Tensor | None = None) -> torch.Tensor:
        """float32 [out, in]: scale * (code - zero), with the scales as they are stored. order: the group of each column."""
        groups = torch.arange(self.codes.shape[1]) // self.type.group_size if order is None else order
        zeros = float(self.type.zero) if self.zeros is None else self.zeros.to(torch.float32)[:, groups]
        return (self.codes.to(torch.float32) - zeros) * self.scales.to(torch.float32)[:, groups]


def rounded(scales: torch.Tensor) -> bool:
    """Whether float16 changes a scale. Raises ValueError for a scale beyond its range."""
    half = scales.to(torch.float16)
    if not bool(torch.isfinite(half).all()):
        raise ValueError("scales beyond the range of float16")
    return not torch.equal(half.to(torch.float32), scales.to(torch.float32))


def order(ckpt: Checkpoint, name: str, qtype: IntegerType, width: int) -> torch.Tensor | None:
    """int64 [in], the group of each of `width` columns, from the tensor `name`. None if column i is in group i // group_size,
    or if the tensor says nothing (-1). Raises UserError if it names no group for a column."""
    found, groups = ckpt.tensor(name).to(torch.int64), -(-width // qtype.group_size)
    if torch.equal(found, torch.arange(width) // qtype.group_size) or bool((found == -1).all()):
        return None
    if found.shape != (width,) or not bool(((found >= 0) & (found < groups)).all()):
        raise UserError(f"{name} of {ckpt.folder} does not name one of {groups} groups for each of {width} columns",
                        "the folder is damaged: make or download it again")
    return found


def permuted(ckpt: Checkpoint, linear: str) -> UserError:
    """The error for a linear whose columns are in another order, where codes are copied."""
    return UserError(f"{linear} of {ckpt.folder} has a permuted g_idx (desc_act, actorder: columns in another order), which "
                     "no GGUF or ONNX type can hold",
                     "quantize the float model with llmc, which keeps the columns in their order")


def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [n, m] -> int32 [n * bits / 32, m]: `32 / bits` rows into one word, first row in the lowest bits."""
    per = 32 // bits
    v = values.view(values.shape[0] // per, per, values.shape[1])
    words = torch.zeros(v.shape[0], v.shape[2], dtype=torch.int32)
    for i in range(per):
        words |= v[:, i].to(torch.int32) << (bits * i)
    return words


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [n, m] -> uint8 [n * 32 / bits, m], the inverse of `pack`."""
    per = 32 // bits
    parts = [((words >> (bits * i)) & ((1 << bits) - 1)).to(torch.uint8) for i in range(per)]
    return torch.stack(parts, dim=1).reshape(words.shape[0] * per, words.shape[1])
