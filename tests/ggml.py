"""Blocks by llama.cpp's own C, by way of its shared library: compared with llmc's, and as folders."""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from rounding import is_decoder_linear, write_folder

from llmc.formats import blocks
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.packing import unpack
from llmc.formats.types import BLOCK_TYPES, BlockTensor, BlockType

FIELDS = ("codes", "d", "m", "scales", "mins")
Stored = dict[str, np.ndarray]  # the bytes of every linear, uint8 [out, bytes of a row]


def kind(qtype: BlockType) -> Kind:
    return Kind[qtype.gguf_type]


@cache
def ggml() -> ctypes.CDLL:
    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None
    assert spec.origin is not None
    library = ctypes.CDLL(str(next((Path(spec.origin).parent / "lib").glob("*ggml-base.*"))))
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    library.ggml_quantize_init.argtypes = [ctypes.c_int]
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


def ggml_quantize(x: np.ndarray, qtype: BlockType, importance: np.ndarray | None = None) -> np.ndarray:
    """float32 [rows, n] -> uint8 [rows, bytes of a row] by llama.cpp's quantizer."""
    assert x.shape[1] % qtype.block == 0  # llama.cpp would write past the end
    out = np.zeros((x.shape[0], x.shape[1] // qtype.block * qtype.block_bytes), np.uint8)
    if importance is None and qtype.name in ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs"):  # llama.cpp aborts without one
        importance = np.ones(x.shape[1], np.float32)
    weights = None if importance is None else importance.ctypes.data
    ggml().ggml_quantize_init(int(kind(qtype)))
    assert ggml().ggml_quantize_chunk(int(kind(qtype)), x.ctypes.data, out.ctypes.data, 0, *x.shape, weights) == out.size
    return out


def ggml_dequantize(data: np.ndarray, qtype: BlockType) -> np.ndarray:
    """uint8 [rows, bytes of a row] -> float32 [rows, n] by llama.cpp's reader."""
    read = getattr(ggml(), f"dequantize_row_{qtype.name.replace('_k', '_K')}")
    read.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    read.restype = None
    out = np.zeros((data.shape[0], data.shape[1] // qtype.block_bytes * qtype.block), np.float32)
    read(data.ctypes.data, out.ctypes.data, out.size)
    return out


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """-0 is not +0 here."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def assert_same(a: BlockTensor, b: BlockTensor) -> None:
    assert a.type is b.type
    for name in FIELDS:
        x, y = getattr(a, name), getattr(b, name)
        if x is None or y is None:
            assert x is y, name
        else:
            assert same_bits(x.numpy(), y.numpy()), name


def blocks_folder(source: Path, out: Path, *names: str) -> tuple[Stored, dict[str, str]]:
    """Every decoder linear in llama.cpp's own rounding, on the named types in turn; returns bytes and types."""
    kept = Checkpoint.open(source).names()
    types = dict(zip((n.removesuffix(".weight") for n in kept if is_decoder_linear(n)), cycle(names), strict=False))
    stored: Stored = {}

    def encode(name: str, t: torch.Tensor) -> dict[str, torch.Tensor] | None:
        if not is_decoder_linear(name):
            return None
        linear = name.removesuffix(".weight")
        stored[linear] = ggml_quantize(np.ascontiguousarray(t.float().numpy()), BLOCK_TYPES[types[linear]])
        return blocks.encode(unpack(stored[linear], BLOCK_TYPES[types[linear]]))

    write_folder(source, out, encode, blocks.config(types))
    return stored, types
