"""MXFP4: 4-bit floats that share a power of two for each 32 weights, as the experts of gpt-oss have them.

    X_blocks  uint8 [experts, out, groups, 16]   two weights to a byte, the first in the low nibble
    X_scales  uint8 [experts, out, groups]       exponents with a bias of 127

The value of code c is VALUES[c] * 2^(scale - 127), exact in bfloat16. Bit 3 of a code is its sign. The model's parameter X
is the transpose, [experts, in, out]. GGUF's type MXFP4 has the same codes and exponents: 17 bytes for 32 weights, the
exponent and then weight j in the low nibble of byte j and weight j + 16 in its high nibble. So blocks move bit for bit.

Sources: OCP Microscaling Formats 1.0; transformers 5.23, integrations/mxfp4.py; llama.cpp, ggml-common.h (block_mxfp4).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from llmc.errors import UserError
from llmc.formats.decoded import Coded, Decoded, Index

if TYPE_CHECKING:
    import numpy as np
    import torch

    from llmc.formats.checkpoint import Checkpoint

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
BLOCK, BLOCK_BYTES = 32, 17  # of GGUF's type


def decode(ckpt: Checkpoint, config: dict[str, Any]) -> Decoded:
    """The experts that are stored as blocks and scales."""
    names, found = set(ckpt.names()), dict[str, Coded]()
    for blocks in ckpt.names():
        name = blocks.removesuffix("_blocks")
        if name == blocks or f"{name}_scales" not in names:
            continue
        shape = ckpt.shape(blocks)
        if ckpt.dtype(blocks) != "U8" or shape[-1] != BLOCK // 2 or ckpt.shape(f"{name}_scales") != shape[:-1]:
            raise UserError(f"{blocks} of {ckpt.folder} is {ckpt.dtype(blocks)} {list(shape)} with scales "
                            f"{list(ckpt.shape(f'{name}_scales'))}, and MXFP4 has 16 bytes and a scale for 32 weights",
                            "download the model again")
        values = (*shape[:-3], shape[-2] * BLOCK, shape[-3])
        found[name] = Coded((blocks, f"{name}_scales"), "MXFP4", values, "BF16", partial(_values, ckpt, name))
    return Decoded(found, note=f"{len(found)} tensors of experts are MXFP4: they are read as the values that they mean")


def _values(ckpt: Checkpoint, name: str, index: Index) -> torch.Tensor:
    """A parameter bfloat16 [experts, in, out], or some of its experts."""
    values = dequantize(ckpt.raw(f"{name}_blocks", index), ckpt.raw(f"{name}_scales", index))
    return values.transpose(-1, -2).contiguous()


def dequantize(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """uint8 [..., groups, 16] and [..., groups] -> bfloat16 [..., groups * 32], exact."""
    import torch

    levels = torch.tensor(VALUES, dtype=torch.bfloat16)
    codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)  # [..., groups, 32]
    values = torch.ldexp(levels[codes.int()].to(torch.float32), (scales.int() - 127)[..., None])
    return values.to(torch.bfloat16).flatten(-2)


def pack(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The blocks as bytes of GGUF's MXFP4, uint8 [..., groups * 17]. blocks, scales: as a folder stores them."""
    import numpy as np

    codes = np.stack([blocks & 15, blocks >> 4], -1).reshape(*blocks.shape[:-1], BLOCK)
    packed = codes[..., :16] | codes[..., 16:] << 4
    return np.concatenate([scales[..., None], packed], -1).reshape(*scales.shape[:-1], -1)


def unpack(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `pack`: uint8 [..., groups * 17] -> blocks [..., groups, 16] and scales [..., groups]."""
    import numpy as np

    raw = data.reshape(*data.shape[:-1], -1, BLOCK_BYTES)
    scales, packed = raw[..., 0], raw[..., 1:]
    codes = np.concatenate([packed & 15, packed >> 4], -1)
    return codes[..., 0::2] | codes[..., 1::2] << 4, scales
