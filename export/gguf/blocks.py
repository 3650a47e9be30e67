"""Packing weights into GGUF blocks, and reading them back. Formats: ggml/src/ggml-common.h of llama.cpp.

    Q4_0  32 weights, 18 bytes   d fp16, 16 bytes of codes          value = d * (code - 8)
    Q4_1  32 weights, 20 bytes   d fp16, m fp16, 16 bytes of codes  value = d * code + m
    Q8_0  32 weights, 34 bytes   d fp16, 32 int8                    value = d * int8
    Q6_K  256 weights, 210 bytes 128 low nibbles, 64 high bits, 16 int8 scales, d fp16

In a byte of Q4_0 and Q4_1 the low nibble is weight i of the block, the high nibble weight i + 16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind
from gguf.quants import quantize

from llmc.errors import UserError
from llmc.formats import packing
from llmc.formats.types import BLOCK_TYPES, BlockTensor, BlockType, IntegerType, QuantizedTensor

BLOCK = 32
SUPER = 256
CHUNK = 1 << 22  # weights encoded at once: bounds the temporaries to a few tens of megabytes
BYTES = np.dtype(np.uint8)


def kind_of_type(qtype: IntegerType | BlockType) -> Kind:
    """The GGUF type that holds the type's codes as they are."""
    if isinstance(qtype, BlockType):
        return Kind[qtype.gguf_type]
    if qtype.group_size % BLOCK == 0 and qtype.bits == 4:
        return Kind.Q4_0 if qtype.symmetric else Kind.Q4_1
    if qtype.group_size % BLOCK == 0 and qtype.bits == 8 and qtype.symmetric:
        return Kind.Q8_0
    raise UserError(f"no GGUF type holds the type {qtype.name} exactly",
                    "quantize with --sym and a group size of 32, 64 or 128")


def nbytes(kind: Kind, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor; its rows (last axis) must be whole blocks."""
    block, size = GGML_QUANT_SIZES[kind]
    assert shape[-1] % block == 0
    return int(np.prod(shape, dtype=np.int64)) // block * int(size)


def check_rows(name: str, shape: tuple[int, ...], kind: Kind) -> None:
    """Refuse a type whose blocks do not divide the rows."""
    block = int(GGML_QUANT_SIZES[kind][0])
    if shape[-1] % block:
        other = "q8_0, f16 or f32" if shape[-1] % BLOCK == 0 else "f16, bf16 or f32"
        raise UserError(f"{name} has rows of {shape[-1]} and {kind.name} needs a multiple of {block}",
                        f"choose {other} for it")


# --------------------------------------------------------------------------------------------------- codes that exist


def block_scales(q: QuantizedTensor) -> np.ndarray:
    """The scales, float16 [out, in / 32]: each repeated for the blocks of its group."""
    return np.repeat(q.scales.numpy(), q.type.group_size // BLOCK, axis=1)


def block_mins(q: QuantizedTensor) -> tuple[np.ndarray, int]:
    """Q4_1's m = -scale * zero as float16 [out, in / 32], and how many groups float16 cannot hold exactly."""
    assert q.zeros is not None
    exact = -q.scales.numpy().astype(np.float32) * q.zeros.numpy().astype(np.float32)  # 11 + 4 bits: exact here
    with np.errstate(over="ignore"):
        rounded = exact.astype(np.float16)
    wrong = int((rounded.astype(np.float32) != exact).sum())
    return np.repeat(rounded, q.type.group_size // BLOCK, axis=1), wrong


def pack_codes(q: QuantizedTensor) -> np.ndarray:
    """A quantized matrix [out, in] as GGUF blocks, uint8 [out, bytes of a row], no code or scale changed."""
    kind = kind_of_type(q.type)
    rows, width = q.shape
    codes = q.codes.numpy().reshape(rows, width // BLOCK, BLOCK)
    parts = [_as_bytes(block_scales(q))]
    if kind == Kind.Q8_0:
        parts.append(codes ^ 0x80)  # code - 128 in two's complement
    else:
        if kind == Kind.Q4_1:
            mins, wrong = block_mins(q)
            assert not wrong, "checked when the export was planned"
            parts.append(_as_bytes(mins))
        parts.append(codes[:, :, : BLOCK // 2] | codes[:, :, BLOCK // 2 :] << 4)
    return np.concatenate(parts, axis=2).reshape(rows, -1)


def unpack_codes(data: np.ndarray, kind: Kind) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The inverse: codes uint8 [out, in], scales and (Q4_1 only) mins as float16 [out, in / 32]."""
    rows = data.shape[0]
    blocks = data.reshape(rows, -1, GGML_QUANT_SIZES[kind][1])
    scales, body = _as_half(blocks[:, :, :2]), blocks[:, :, 2:]
    if kind == Kind.Q8_0:
        return (body ^ 0x80).reshape(rows, -1), scales, None
    mins = None
    if kind == Kind.Q4_1:
        mins, body = _as_half(body[:, :, :2]), body[:, :, 2:]
    codes = np.concatenate([body & 0x0F, body >> 4], axis=2)
    return codes.reshape(rows, -1), scales, mins


def _as_bytes(half: np.ndarray) -> np.ndarray:
    """float16 [a, b] -> uint8 [a, b, 2]."""
    return np.ascontiguousarray(half).view(BYTES).reshape(*half.shape, 2)


def _as_half(raw: np.ndarray) -> np.ndarray:
    """uint8 [a, b, 2] -> float16 [a, b]."""
    return np.ascontiguousarray(raw).view(np.float16).reshape(raw.shape[:2])


# --------------------------------------------------------------------------------------------------------- float data


def encode_float(name: str, t: torch.Tensor, kind: Kind) -> np.ndarray:
    """A float tensor as the bytes of `kind`: uint8 [rows, bytes of a row]."""
    flat = t.reshape(-1, t.shape[-1])
    out = np.empty((flat.shape[0], nbytes(kind, (1, flat.shape[1]))), dtype=np.uint8)
    step = max(1, CHUNK // flat.shape[1])
    for i in range(0, flat.shape[0], step):
        out[i : i + step] = _encode_rows(name, flat[i : i + step], kind)
    return out


def _encode_rows(name: str, t: torch.Tensor, kind: Kind) -> np.ndarray:
    if kind == Kind.BF16:
        return t.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    x = t.to(torch.float32).contiguous().numpy()
    if kind == Kind.F32:
        return x.view(BYTES)
    if kind == Kind.F16:
        with np.errstate(over="ignore"):
            half = x.astype(np.float16)
        if not np.isfinite(half).all():
            raise UserError(f"{name} holds values beyond {np.finfo(np.float16).max:g}, which f16 cannot",
                            "choose bf16 or f32 for it (--float-type, --embedding)")
        return half.view(BYTES)
    if kind == Kind.Q8_0:
        return quantize(x, kind)  # gguf's own, bit for bit what llama-quantize writes
    if kind == Kind.Q6_K:
        return quantize_q6_k(x)
    from llmc.rounding.rtn import rtn

    q = rtn(torch.from_numpy(x), BLOCK_TYPES[kind.name.lower()])
    assert isinstance(q, BlockTensor)
    return packing.pack(q)


def quantize_q6_k(x: np.ndarray) -> np.ndarray:
    """float32 [rows, n] (n a multiple of 256) -> Q6_K blocks, uint8 [rows, n / 256 * 210].

    A weight is d * scale * (q - 32) with q of 6 bits, an int8 `scale` for every 16 weights and a float16 d for 256.
    The scale of each 16 is the best (least squared error weighted with x², as ggml weights it) of those that put its
    largest weight at 28 … 36 steps; d then puts the largest scale at 127, and q is rounded once more on what is stored.
    """
    blocks = x.reshape(-1, SUPER // 16, 16)
    ideal = _best_scales(blocks)
    largest = np.abs(ideal).max(axis=1, keepdims=True)
    d = (largest / 127).astype(np.float16)
    d = np.where(127.5 * d.astype(np.float32) < largest, np.nextafter(d, np.float16(np.inf)), d)  # where d is subnormal
    step = d.astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        scales = np.where(step > 0, np.clip(np.rint(ideal / step), -127, 127), 0).astype(np.int8)
        q = np.rint(blocks / (step * scales)[..., None])
    q = (np.clip(np.nan_to_num(q, posinf=0, neginf=0), -32, 31) + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    # half h of the 256, then 4 runs of 32: their low nibbles pair up 0 with 2 and 1 with 3, the high bits go by four
    low = (q[:, :, :2] & 0x0F) | (q[:, :, 2:] & 0x0F) << 4
    high = np.bitwise_or.reduce((q >> 4) << np.array([0, 2, 4, 6], dtype=np.uint8)[:, None], axis=2)
    n = blocks.shape[0]
    packed = np.concatenate(
        [low.reshape(n, -1), high.reshape(n, -1), scales.view(BYTES), np.ascontiguousarray(d).view(BYTES)], axis=1)
    return packed.reshape(x.shape[0], -1)


def _best_scales(blocks: np.ndarray) -> np.ndarray:
    """float32 [n, 16, 16] -> [n, 16]: for each run of 16 weights the scale s with the least error of s * (-32 … 31)."""
    weight = blocks * blocks
    index = np.abs(blocks).argmax(axis=2)[..., None]
    extreme = np.take_along_axis(blocks, index, axis=2)
    extreme[extreme == 0] = 1  # a run of zeros: every q is 0 below, and so is the scale
    best = np.zeros(blocks.shape[:2], dtype=np.float32)
    gain = np.zeros_like(best)
    for steps in range(28, 37):  # the extreme lands on -steps, clipped to -32
        q = np.clip(np.rint(blocks * (np.float32(-steps) / extreme)), -32, 31)
        weighted = weight * q
        cross, power = (weighted * blocks).sum(axis=2), (weighted * q).sum(axis=2)
        scale = cross / np.maximum(power, np.finfo(np.float32).tiny)
        better = scale * cross > gain  # the error of the best scale is const - cross² / power
        best = np.where(better, scale, best)
        gain = np.where(better, scale * cross, gain)
    return best


def encode(
    name: str, source: QuantizedTensor | BlockTensor | torch.Tensor, kind: Kind
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes of one tensor of the file."""
    if isinstance(source, BlockTensor):
        return packing.pack(source)
    if isinstance(source, QuantizedTensor):
        return pack_codes(source)
    return encode_float(name, source, kind)
