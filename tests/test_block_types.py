"""Block types and their bytes against gguf's readers, llama.cpp's own C, and numbers worked out by hand."""

from __future__ import annotations

import gguf.quants
import numpy as np
import pytest
import torch
from ggml import assert_same, ggml_dequantize, ggml_quantize, kind, same_bits
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.errors import UserError
from llmc.formats import codebooks
from llmc.formats.packing import LAYOUTS, pack, unpack
from llmc.formats.types import BLOCK_TYPES, BlockTensor, BlockType, type_named

every_type = pytest.mark.parametrize("qtype", BLOCK_TYPES.values(), ids=BLOCK_TYPES)


def random_tensor(qtype: BlockType, rows: int = 3, width: int = 768, seed: int = 0) -> BlockTensor:
    """Codes and integers over their whole ranges; d and dmin of all sizes and signs, zeros of both signs among them."""
    g = torch.Generator().manual_seed(seed)

    def factors() -> torch.Tensor:
        if qtype.exponent:
            return 2.0 ** torch.randint(-128, 121, (rows, width // qtype.block), generator=g).float()
        x = torch.randn(rows, width // qtype.block, generator=g) * 10 ** (torch.rand(1, generator=g) * 9 - 6)
        x[torch.rand(x.shape, generator=g) < 0.1] *= 0  # -0 from negative ones
        return x.half()

    def integers(allowed: tuple[int, int] | None) -> torch.Tensor | None:
        if allowed is None:
            return None
        step = qtype.scale_step
        x = torch.randint(0, (allowed[1] - allowed[0]) // step + 1, (rows, width // qtype.group), generator=g)
        ends = torch.tensor(allowed)[x % 2]
        return (allowed[0] + step * x).where(torch.rand(x.shape, generator=g) > 0.2, ends).to(torch.int8)

    if qtype.codebook is None:
        codes = torch.randint(0, len(qtype.levels), (rows, width), generator=g, dtype=torch.uint8)
    else:
        codes = torch.from_numpy(random_entries(qtype, rows * width // qtype.block, seed)).view(rows, width)
    m = factors() if qtype.has_min else None
    return BlockTensor(qtype, codes, factors(), m, integers(qtype.scale_range), integers(qtype.min_range))


def random_entries(qtype: BlockType, blocks: int, seed: int) -> np.ndarray:
    """Codes that the type can store, uint8 [blocks, block]: any entries, signs and shifts."""
    rng = np.random.default_rng(seed)
    counts, c = codebooks.counts(qtype), codebooks.book(qtype)
    most = {"entries": 2**c.bits, "signs": 2**c.signs, "shifts": 2}
    parts = {part: rng.integers(0, most[part], (blocks, n)).astype(np.uint16 if part == "entries" else np.uint8)
             for part, n in counts.items()}
    return codebooks.codes_of(parts, qtype)


def constant(qtype: BlockType, code: int, scale: int, minimum: int, d: float, m: float, width: int = 256) -> BlockTensor:
    """One row in which every number of a kind is the same."""

    def integers(value: int, allowed: tuple[int, int] | None) -> torch.Tensor | None:
        return None if allowed is None else torch.full((1, width // qtype.group), value, dtype=torch.int8)

    def factors(value: float) -> torch.Tensor:
        return torch.full((1, width // qtype.block), value, dtype=torch.float32 if qtype.exponent else torch.float16)

    codes = torch.full((1, width), code, dtype=torch.uint8)
    if qtype.codebook is not None:  # one entry, as the number of a code
        digits = np.tile(codebooks.table(qtype).digits[code], width // qtype.codebook.size)
        codes = torch.from_numpy(codebooks.code(digits, np.zeros_like(digits), qtype))[None]
    return BlockTensor(qtype, codes, factors(d),
                       factors(m) if qtype.has_min else None,
                       integers(scale, qtype.scale_range), integers(minimum, qtype.min_range))


def assert_read_alike(t: BlockTensor) -> None:
    data, ours = pack(t), t.dequantize().numpy()
    assert same_bits(ours, gguf.quants.dequantize(data, kind(t.type)))
    assert same_bits(ours, ggml_dequantize(data, t.type))


def weights(seed: int, rows: int = 8, width: int = 1024) -> np.ndarray:
    """Heavy-tailed rows of different sizes, with a block of zeros."""
    rng = np.random.default_rng(seed)
    x = rng.standard_t(3, (rows, width)) * 10.0 ** rng.uniform(-4, 1, (rows, 1))
    x[0, :256] = 0
    return x.astype(np.float32)


# ------------------------------------------------------------------------------------------------------------ the table


@every_type
def test_sizes_are_ggmls(qtype):
    block, size = GGML_QUANT_SIZES[kind(qtype)]
    assert (qtype.block, qtype.block_bytes) == (block, size)
    assert qtype.bits_per_weight == 8 * size / block


def test_every_type_has_a_layout_and_its_name():
    assert BLOCK_TYPES.keys() == LAYOUTS.keys()
    assert all(type_named(name).name == name for name in BLOCK_TYPES)
    uneven = {"iq4_nl", "iq4_xs", "mxfp4", "iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s"}
    assert {name for name, qtype in BLOCK_TYPES.items() if not qtype.uniform} == uneven
    assert BLOCK_TYPES["iq4_xs"].levels == gguf.quants.IQ4_NL.kvalues


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match="'q7_k'") as e:
        type_named("q7_k")
    assert all(name in e.value.hint for name in BLOCK_TYPES)


# ------------------------------------------------------------------------------------------------ values, and the bytes


@every_type
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), blocks=st.integers(1, 4), rows=st.integers(1, 5))
def test_random_tensors_are_read_alike_and_unpacking_undoes_packing(qtype, seed, blocks, rows):
    t = random_tensor(qtype, rows, blocks * qtype.block, seed)
    assert_read_alike(t)
    assert_same(unpack(pack(t), qtype), t)


@every_type
@pytest.mark.parametrize("d", [0.0, -0.0, 1.0, -0.3, 2.0**-24, 65504.0, -65504.0])
def test_extremes_are_read_alike(qtype, d):
    if qtype.exponent:
        d = {0.0: 2.0**-128, 65504.0: 2.0**123}.get(d, 2.0 ** round(np.log2(abs(d) or 1)))
    scales, minimums = qtype.scale_range or (0, 0), qtype.min_range or (0, 0)
    for code in (0, len(qtype.levels) // 2, len(qtype.levels) - 1):
        for scale in scales:
            for minimum in minimums:
                for m in (0.0, 1.0 / 3, -d):
                    t = constant(qtype, code, scale, minimum, d, m)
                    assert_read_alike(t)
                    assert_same(unpack(pack(t), qtype), t)


@every_type
def test_a_weight_is_what_the_definition_says(qtype):
    t = random_tensor(qtype, rows=2, width=512)
    values, scales, lows = t.dequantize(), t.group_scales(), t.group_lows()
    assert scales.shape == lows.shape == (2, 512 // qtype.group)
    f = np.float32
    for row in range(2):
        for column in range(0, 512, 7):
            b, g = (row, column // qtype.block), (row, column // qtype.group)
            scale = f(t.d[b]) * (f(1) if t.scales is None else f(t.scales[g])) * f(qtype.unit)
            low = f(0)
            if t.m is not None:
                low = f(t.m[b]) if t.mins is None else -(f(t.m[b]) * f(t.mins[g]))
            assert scales[g] == scale
            assert lows[g] == low
            assert values[row, column] == scale * f(qtype.levels[t.codes[row, column]]) + low


@every_type
def test_the_widest_products_are_exact(qtype):
    """So the order of the products, or a fused multiply-add, cannot change a bit."""
    odd = torch.tensor(2047.0).half()  # all 11 bits of a float16
    scales = qtype.scale_range or (1, 1)
    products = [float(odd) * scale * level for scale in range(scales[0], scales[1] + 1) for level in qtype.levels]
    assert all(float(np.float32(p)) == p for p in products)


@every_type
@pytest.mark.parametrize("weighted", [False, True])
def test_llama_cpps_own_blocks_survive(qtype, weighted):
    x = weights(seed=1)
    importance = np.random.default_rng(2).uniform(0.1, 10, x.shape[1]).astype(np.float32) if weighted else None
    data = ggml_quantize(x, qtype, importance)
    t = unpack(data, qtype)
    assert np.array_equal(pack(t), data)
    assert same_bits(t.dequantize().numpy(), ggml_dequantize(data, qtype))
    most = 0.15 if qtype.bits_per_weight > 2.5 else 0.6 if qtype.codebook else 0.8  # its ternary codes are the worst
    assert np.square(t.dequantize().numpy() - x).mean() < most * np.square(x).mean()  # weights in their own places


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp4", "tq1_0", "tq2_0"])
def test_ggufs_own_blocks_survive(name):
    data = gguf.quants.quantize(weights(seed=3), Kind[name.upper()])
    t = unpack(data, BLOCK_TYPES[name])
    assert np.array_equal(pack(t), data)
    assert same_bits(t.dequantize().numpy(), gguf.quants.dequantize(data, Kind[name.upper()]))


@pytest.mark.parametrize("qtype", [t for t in BLOCK_TYPES.values() if len(t.levels) != 3], ids=lambda t: t.name)
def test_any_bytes_survive(qtype):
    """The layouts leave no bit of a block out."""
    data = np.random.default_rng(4).integers(0, 256, (5, 3 * qtype.block_bytes), dtype=np.uint8)
    assert np.array_equal(pack(unpack(data, qtype)), data)


def test_every_byte_of_ternary_blocks_is_read():
    """Their bytes have more values than three codes need, so not every byte survives."""
    qtype = BLOCK_TYPES["tq1_0"]
    data = np.random.default_rng(4).integers(0, 256, (5, 3 * qtype.block_bytes), dtype=np.uint8)
    t = unpack(data, qtype)
    finite = torch.isfinite(t.d).repeat_interleave(256, 1).numpy()
    assert np.array_equal(t.dequantize().numpy()[finite], gguf.quants.dequantize(data, Kind.TQ1_0)[finite])
    assert_same(unpack(pack(t), qtype), t)
    for at in range(BLOCK_TYPES["tq2_0"].block_bytes - 2):
        data = pack(random_tensor(BLOCK_TYPES["tq2_0"]))
        data[0, at] = 0xFF
        with pytest.raises(ValueError, match="a code 3, and tq2_0 has the codes 0 … 2"):
            unpack(data, BLOCK_TYPES["tq2_0"])


@pytest.mark.parametrize(("name", "problem"), [
    ("iq2_xxs", "8 codes in a row are no entry"), ("iq3_s", "4 codes in a row are no entry"),
    ("iq1_s", "32 codes in a row are shifted in both directions"), ("iq3_xxs", "an odd number of minus signs")])
def test_codes_that_a_codebook_lacks_are_refused(name, problem):
    qtype = BLOCK_TYPES[name]
    t = random_tensor(qtype)
    if "shifted" in problem:
        t.codes[0, :8] ^= 1
    elif "minus" in problem:
        t.codes[0, 0] = len(qtype.levels) - 1 - t.codes[0, 0]
    else:
        missing = np.flatnonzero(codebooks.table(qtype).numbers < 0)[0]
        size = qtype.codebook.size
        digits = missing // codebooks.kinds(qtype) ** np.arange(size) % codebooks.kinds(qtype)
        t.codes[0, :size] = torch.from_numpy(codebooks.code(digits, np.zeros_like(digits), qtype))
    with pytest.raises(ValueError, match=problem):
        pack(t)


def test_scales_and_factors_without_a_code_are_refused():
    t = random_tensor(BLOCK_TYPES["iq2_s"])
    t.scales[0, 0] = 2
    with pytest.raises(ValueError, match="integers are not 1, 3, … 31"):
        pack(t)
    t = random_tensor(BLOCK_TYPES["mxfp4"])
    t.d[0, 0] = 3.0
    with pytest.raises(ValueError, match="factors are not powers of two"):
        pack(t)


def test_q4_k_scales_by_hand():
    t = constant(BLOCK_TYPES["q4_k"], 0, 0, 0, 1.0, -2.0)
    assert t.scales is not None
    assert t.mins is not None
    t.scales[0, 1], t.scales[0, 5] = 0b000111, 0b101010
    t.mins[0, 1], t.mins[0, 5] = 0b111000, 0b010101
    t.codes[0, 32], t.codes[0, 3] = 9, 6
    data = pack(t)[0].tobytes()
    assert data[:4] == np.array([1, -2], np.float16).tobytes()
    assert data[4:16] == bytes([0, 0b10_000111, 0, 0, 0, 0b01_111000, 0, 0, 0, 0b0101_1010, 0, 0])
    assert data[16:20] == bytes([0x90, 0, 0, 0x06])
    assert not any(data[20:])


def test_scales_may_be_int16():
    t = random_tensor(BLOCK_TYPES["q6_k"])
    data = pack(t)
    assert t.scales is not None
    t.scales = t.scales.to(torch.int16)
    assert np.array_equal(pack(t), data)


def test_numbers_outside_their_range_do_not_spill():
    t = random_tensor(BLOCK_TYPES["q3_k"])
    t.codes[0, 0] = 8
    with pytest.raises(ValueError, match=r"0 … 8 are outside the range of the format, 0 … 7"):
        pack(t)
    t.codes[0, 0] = 7
    assert t.scales is not None
    t.scales[0, 0] = 32
    with pytest.raises(ValueError, match=r"-32 … 32 are outside the range of the format, -32 … 31"):
        pack(t)
