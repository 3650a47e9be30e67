"""The bytes of ONNX Runtime's weight-only quantized matrices, and the quantization types that they hold.

MatMulNBits (com.microsoft, docs/ContribOperators.md of ONNX Runtime): value = scale * (code - zero) in blocks of
`block_size` columns of a row of [N, K].

    B            uint8 [N, K / block, block * bits / 8]   4 bits: the even column in the low nibble
    scales       float32 [N, K / block]
    zero_points  uint8 [N, ceil(K / block * bits / 8)]    packed as B along a row; absent: 8 for 4 bits, 128 for 8

DequantizeLinear (ONNX opset 21), on the transpose [K, N] so that ONNX Runtime can fuse it with the MatMul after it: signed
codes (code - 8, code - 128) where symmetric, because there an absent zero point is 0; else unsigned ones with zero points.
"""

from __future__ import annotations

import numpy as np
import torch

from llmc.formats.types import BlockTensor, BlockType, IntegerType, QuantizedTensor

BLOCK = 32
MOST = 128  # larger blocks are slow or wrong in some kernels, so they are split and their scale is repeated
LEAST = 16  # MatMulNBits takes powers of two from 16 on
BLOCK_TYPES = {"q4_0": 4, "q4_1": 4, "q8_0": 8}  # q4_1 only if its minimums are whole steps
ROUNDED = {4: "q4_0", 8: "q8_0"}  # the type to which a float matrix is rounded at the export, by its bits


def held_as(qtype: IntegerType | BlockType) -> IntegerType | None:
    """The MatMulNBits type that holds every value of `qtype`, None if there is none (see `exact` for q4_1)."""
    if isinstance(qtype, BlockType):
        bits = BLOCK_TYPES.get(qtype.name)
        return None if bits is None else IntegerType(bits, BLOCK, not qtype.has_min)
    block = min(MOST, qtype.group_size & -qtype.group_size)
    return IntegerType(qtype.bits, block, qtype.symmetric) if qtype.bits in (4, 8) and block >= LEAST else None


def exact(q: QuantizedTensor | BlockTensor) -> QuantizedTensor | None:
    """The same codes and values in the type that `held_as` returns.

    Returns None if a minimum of q4_1 is not -n steps with a whole n from 0 to 15."""
    qtype = held_as(q.type)
    if qtype is None:
        return None
    if isinstance(q, QuantizedTensor):
        repeats = q.type.group_size // qtype.group_size
        zeros = None if q.zeros is None else q.zeros.repeat_interleave(repeats, 1)
        return QuantizedTensor(qtype, q.codes, q.scales.repeat_interleave(repeats, 1), zeros)
    if q.m is None:
        return QuantizedTensor(qtype, q.codes, q.d)
    d, m = q.d.to(torch.float32), q.m.to(torch.float32)
    zeros = torch.where(d == 0, torch.zeros_like(d), -m / d).round()
    if not bool(((zeros >= 0) & (zeros <= qtype.max_code) & (d * zeros == -m)).all()):
        return None
    return QuantizedTensor(qtype, q.codes, q.d, zeros.to(torch.uint8))


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [n, m] -> uint8 [n, ceil(m * bits / 8)], the even column in the low nibble. 8 bits do not change."""
    if bits == 8:
        return np.ascontiguousarray(values)
    even = np.pad(values, ((0, 0), (0, values.shape[1] % 2)))
    return even[:, 0::2] | even[:, 1::2] << 4


def unpack(data: np.ndarray, bits: int, width: int) -> np.ndarray:
    """The inverse of `pack`: uint8 [n, bytes] -> uint8 [n, width]."""
    if bits == 8:
        return data
    return np.stack([data & 15, data >> 4], axis=-1).reshape(data.shape[0], -1)[:, :width]


def signed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes as two's complement of code - 2**(bits-1), in uint8. The function is its own inverse."""
    return codes ^ np.uint8(1 << (bits - 1))
