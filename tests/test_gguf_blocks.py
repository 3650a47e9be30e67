"""GGUF blocks against gguf's own readers, and against numbers worked out by hand."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.errors import UserError
from llmc.export.gguf import blocks
from llmc.formats import packing
from llmc.formats.quantized import as_blocks
from llmc.formats.types import BLOCK_TYPES, IntegerType, QuantizedTensor
from llmc.rounding.q6_k import round_q6_k


def pack_codes(q: QuantizedTensor) -> np.ndarray:
    return packing.pack(as_blocks(q))


def quantize_q6_k(x: np.ndarray) -> np.ndarray:
    return packing.pack(round_q6_k(x))


def random_tensor(qtype: IntegerType, rows: int = 5, width: int = 256, seed: int = 0) -> QuantizedTensor:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, qtype.max_code + 1, (rows, width), generator=g, dtype=torch.uint8)
    scales = (torch.randn(rows, width // qtype.group_size, generator=g) * 0.1).half()  # negative ones too
    return QuantizedTensor(qtype, codes, scales)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
def test_codes_are_read_by_gguf_as_the_type_defines_them(bits, group_size):
    q = random_tensor(IntegerType(bits, group_size))
    data = pack_codes(q)
    assert np.array_equal(dequantize(data, blocks.kind_of_type(q.type)), q.dequantize().numpy())


def test_q4_0_block_by_hand():
    codes = torch.arange(32, dtype=torch.uint8)[None] % 16
    data = pack_codes(QuantizedTensor(IntegerType(4, 32), codes, torch.tensor([[0.5]], dtype=torch.float16)))
    assert data.tobytes() == bytes([0x00, 0x38]) + bytes((i % 16) | ((i + 16) % 16) << 4 for i in range(16))


def test_q8_0_block_by_hand_holds_code_0_as_minus_128():
    codes = torch.tensor([[0, 128, 255] + [129] * 29], dtype=torch.uint8)
    data = pack_codes(QuantizedTensor(IntegerType(8, 32), codes, torch.tensor([[1.0]], dtype=torch.float16)))
    assert data[0, 2:].view(np.int8).tolist() == [-128, 0, 127] + [1] * 29


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([4, 8]), st.sampled_from([32, 64, 128]), st.integers(0, 2**32 - 1))
def test_unpacking_undoes_packing(bits, group_size, seed):
    q = random_tensor(IntegerType(bits, group_size), seed=seed)
    found = packing.unpack(pack_codes(q), BLOCK_TYPES[blocks.kind_of_type(q.type).name.lower()])
    assert np.array_equal(found.codes.numpy(), q.codes.numpy())
    assert np.array_equal(found.d.numpy()[:, :: group_size // 32], q.scales.numpy())
    assert found.m is None


def test_asymmetric_codes_are_levels_of_q5_0():
    q = random_tensor(IntegerType(4, 64, symmetric=False))
    q.zeros = torch.randint(0, 16, q.scales.shape, dtype=torch.uint8)
    q.codes[0, :2], q.codes[1, :2], q.zeros[0, 0], q.zeros[1, 0] = 15, 0, 0, 15  # 15 steps and -15
    assert np.array_equal(dequantize(pack_codes(q), Kind.Q5_0), q.dequantize().numpy())


@pytest.mark.parametrize("qtype", [IntegerType(8, 32, symmetric=False), IntegerType(4, 16), IntegerType(4, 48)])
def test_a_type_that_no_type_holds_is_refused(qtype):
    with pytest.raises(UserError, match=qtype.name):
        blocks.kind_of_type(qtype)


# ---------------------------------------------------------------------------------------------------------- float types


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0])
def test_floats_are_encoded_as_gguf_encodes_them(kind):
    x = torch.randn(7, 64)
    data = blocks.encode_float("x", x, kind)
    assert np.array_equal(dequantize(data, kind), dequantize(quantize(x.numpy(), kind).view(np.uint8), kind))


def test_a_value_beyond_float16_is_refused():
    with pytest.raises(UserError, match="w holds values beyond 65504"):
        blocks.encode_float("w", torch.tensor([[7e4] * 32]), Kind.F16)


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0, Kind.IQ4_NL, Kind.Q4_K, Kind.Q6_K])
def test_a_value_beyond_the_scales_is_refused(kind):
    for value in (1e12, float("nan"), float("inf")):
        with pytest.raises(UserError, match="w has weights that are not finite, or too large for the scales"):
            blocks.encode_float("w", torch.tensor([[value] * 256]), kind)


def q6_k_error(x: np.ndarray) -> np.ndarray:
    """Root mean square error of each block of 256, over the root mean square of the block."""
    y = dequantize(quantize_q6_k(x), Kind.Q6_K).reshape(-1, 256)
    x = x.reshape(-1, 256)
    return np.sqrt(((x - y) ** 2).mean(1) / np.maximum((x**2).mean(1), 1e-30))


def ggml_q6_k(x: np.ndarray) -> np.ndarray:
    """llama.cpp's own quantizer."""
    folder = Path(importlib.util.find_spec("llama_cpp").origin).parent / "lib"
    quantize_chunk = ctypes.CDLL(str(next(folder.glob("*ggml-base.*")))).ggml_quantize_chunk
    quantize_chunk.restype = ctypes.c_size_t
    number = ctypes.c_int64
    quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, number, number, number, ctypes.c_void_p]
    out = np.zeros((x.shape[0], x.shape[1] // 256 * 210), np.uint8)
    quantize_chunk(int(Kind.Q6_K), x.ctypes.data, out.ctypes.data, 0, *x.shape, None)
    return out


@pytest.mark.parametrize("heavy_tails", [False, True])
def test_q6_k_is_as_good_as_ggmls(heavy_tails):
    rng = np.random.default_rng(0)
    x = (rng.standard_t(3, (16, 1024)) if heavy_tails else rng.standard_normal((16, 1024))).astype(np.float32)
    ours, theirs = (dequantize(data, Kind.Q6_K) - x for data in (quantize_q6_k(x), ggml_q6_k(x)))
    assert (ours**2).mean() < 1.02 * (theirs**2).mean()
    assert (ours**2 * x**2).mean() < 1.02 * (theirs**2 * x**2).mean()  # the weighting that both minimise


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(1e-2, 1e4), st.booleans())
def test_q6_k_error_is_bounded_at_any_size(seed, size, heavy):
    rng = np.random.default_rng(seed)
    x = (rng.standard_t(2, (2, 512)) if heavy else rng.standard_normal((2, 512))) * size
    x = x.astype(np.float32)
    y = dequantize(quantize_q6_k(x), Kind.Q6_K)
    runs = np.abs(x).reshape(-1, 16).max(1), np.abs(x - y).reshape(-1, 16).max(1)
    largest = np.repeat(np.abs(x).reshape(-1, 256).max(1), 16)
    # half a step of a sixteenth's own scale, and what rounding that scale to 1/127 of the block's largest adds
    assert (runs[1] <= runs[0] / 24 + 0.3 * largest / 32 + 1e-30).all()


def test_q6_k_of_zeros_and_of_exact_values():
    assert not dequantize(quantize_q6_k(np.zeros((2, 256), np.float32)), Kind.Q6_K).any()
    x = np.tile(np.arange(-32, 32, dtype=np.float32), 4)[None] * 4.0  # every sixteenth on a 6-bit type
    assert q6_k_error(x).max() < 0.01


def test_rows_that_no_block_divides_name_the_alternatives():
    with pytest.raises(UserError, match=r"token_embd.weight has rows of 576 weights and Q6_K needs a multiple of 256") as e:
        blocks.check_rows("token_embd.weight", (10, 576), Kind.Q6_K)
    assert "q8_0" in e.value.hint
    with pytest.raises(UserError) as e:
        blocks.check_rows("x", (10, 40), Kind.Q8_0)
    assert "q8_0" not in e.value.hint
