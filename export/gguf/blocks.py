"""The bytes of a tensor in a GGUF file: the GGUF type for a quantization type, and the encoding of float tensors."""

from __future__ import annotations

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind

from llmc.errors import UserError
from llmc.formats import packing
from llmc.formats.quantized import Quantized, as_blocks, block_type
from llmc.formats.types import BlockType, IntegerType
from llmc.rounding.tables import CHUNK, round_rows

BLOCK = 32
BYTES = np.dtype(np.uint8)


def kind_of_type(qtype: IntegerType | BlockType) -> Kind:
    """The GGUF type that holds the codes of a quantization type without change; raises UserError if there is none."""
    held = block_type(qtype)
    if held is None:
        raise UserError(f"no GGUF type holds {qtype.name} exactly",
                        "quantize with --sym and a group size of 32, 64 or 128")
    return Kind[held.gguf_type]


def nbytes(kind: Kind, shape: tuple[int, ...]) -> int:
    """The bytes of a tensor. Its rows (last axis) must be whole blocks."""
    block, size = GGML_QUANT_SIZES[kind]
    assert shape[-1] % block == 0
    return int(np.prod(shape, dtype=np.int64)) // block * int(size)


def check_rows(name: str, shape: tuple[int, ...], kind: Kind) -> None:
    """Raise UserError if the blocks of `kind` do not divide the rows."""
    block = int(GGML_QUANT_SIZES[kind][0])
    if shape[-1] % block:
        other = "q8_0, f16 or f32" if shape[-1] % BLOCK == 0 else "f16, bf16 or f32"
        raise UserError(f"{name} has rows of {shape[-1]} weights and {kind.name} needs a multiple of {block}",
                        f"choose {other} for it")


def encode_float(name: str, t: torch.Tensor, kind: Kind) -> np.ndarray:
    """Encode a float tensor as `kind`: uint8 [rows, bytes per row]."""
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
    try:
        return packing.pack(round_rows(t, kind.name.lower()))
    except ValueError as e:
        raise UserError(f"{name} has {e}", "choose bf16 or f32 for it (--float-type, --embedding)") from e


def encode(name: str, source: Quantized | torch.Tensor, kind: Kind) -> np.ndarray:
    """The bytes of one tensor of the file, uint8 [rows, bytes per row]. Codes, factors and bytes (a source of uint8) are
    copied without change."""
    if not isinstance(source, torch.Tensor):
        return packing.pack(as_blocks(source))
    return source.numpy() if source.dtype == torch.uint8 else encode_float(name, source, kind)
