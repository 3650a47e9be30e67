"""Weights that lie on a type: the codes are found again from the values alone, and llmc carries them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import cycle, product
from pathlib import Path

import numpy as np
import pytest
import torch
from ggml import ggml_quantize
from quantizing import lost, problem, settings
from rounding import is_decoder_linear, round_to
from tiny import build, divergence, edit_tensors

import llmc
from llmc.compress.quantize import carried
from llmc.compress.quantize.gptq import gptq
from llmc.compress.quantize.run import quantize
from llmc.formats import quantized
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.packing import pack, unpack
from llmc.formats.types import BLOCK_TYPES, BlockTensor, IntegerType
from llmc.rounding import lattice
from llmc.rounding.rtn import rtn

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMES = [t.name for t in lattice.TYPES]


def weight(rows: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(seed)) * 0.05


def of_llama_cpp(w: torch.Tensor, name: str) -> BlockTensor:
    return unpack(ggml_quantize(np.ascontiguousarray(w.numpy()), BLOCK_TYPES[name]), BLOCK_TYPES[name])


def brute(block: list[float], levels: range, dtype: torch.dtype) -> bool:
    """Slow and obvious: whether one positive or negative float16 d gives every value, each with some level."""
    every = torch.arange(-0x8000, 0x7C00, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    every = every[torch.isfinite(every)]
    made = (every[:, None] * torch.tensor(list(levels), dtype=torch.float32)).to(dtype).float()  # [all d, levels]
    fits = torch.stack([(made == v).any(1) for v in block])
    return bool(fits.all(0).any())


COARSE = {n for n in NAMES if n.endswith("_k")}  # bfloat16 holds their integers too coarsely


@pytest.mark.parametrize(("name", "dtype"), [(name, dtype) for name, dtype in product(NAMES, DTYPES)
                                             if name not in COARSE or dtype != torch.bfloat16])
def test_codes_of_llama_cpp_are_found_again(name: str, dtype: torch.dtype) -> None:
    q = of_llama_cpp(weight(24, 512), name)
    stored = q.dequantize().to(dtype)
    found = lattice.find(stored.float(), q.type)
    assert found is not None
    assert found.whole
    t = found.tensor
    if name != "q6_k":
        assert torch.equal(t.codes, q.codes)
    assert torch.equal(t.dequantize().to(dtype), stored)
    if dtype != torch.bfloat16 and name != "q6_k":  # bfloat16 holds several d as the same values; q6_k: all signs may change
        assert pack(t).tobytes() == pack(q).tobytes()
    qtype = lattice.type_of(stored.float())
    assert qtype is not None
    assert qtype.name == ("tq1_0" if name == "tq2_0" else name)  # the smaller one of two with the same values


@pytest.mark.parametrize("dtype", DTYPES)
def test_against_the_search_over_every_float16(dtype: torch.dtype) -> None:
    """Blocks of 8 weights on 16 levels, whole ones, damaged ones and random ones."""
    g, qtype = torch.Generator().manual_seed(1), IntegerType(4, 8)
    d = (torch.rand(30, 1, generator=g) * 0.1 - 0.05).half().float()
    v = (torch.randint(-8, 8, (30, 8), generator=g) * d).to(dtype).float()
    v[10:20, 3] = (v[10:20, 3] * 1.04).to(dtype).float()
    v[20:, :] = torch.randn(10, 8, generator=g).to(dtype).float()
    v[20:23, 2:] = 0
    levels = lattice.as_blocks(qtype)
    assert levels is not None
    t, lies = lattice._blocks(v, levels, dtype)
    assert lies.tolist() == [brute(row.tolist(), range(-8, 8), dtype) for row in v]
    again = ((t.codes.float() - 8) * t.d.float()).to(dtype).float()
    assert torch.equal(again[lies], v[lies])
    assert 10 <= int(lies.sum()) < 30


@pytest.mark.parametrize("size", [32, 128])
def test_integer_types_of_any_group(size: int) -> None:
    q = round_to(IntegerType(4, size), weight(8, 256))
    found = lattice.find(q.dequantize().bfloat16().float(), q.type)
    assert found is not None
    assert found.whole
    assert torch.equal(found.tensor.dequantize().bfloat16(), q.dequantize().bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
def test_trained_weights_lie_on_no_type(dtype: torch.dtype) -> None:
    assert lattice.type_of(weight(64, 256).to(dtype).float()) is None
    assert lattice.type_of(torch.zeros(4, 64)) is None
    assert lattice.find(weight(64, 256), BLOCK_TYPES["q4_0"]) is None
    assert lattice.find(weight(64, 256), BLOCK_TYPES["q4_k"]) is None
    assert lattice.find(weight(64, 256), BLOCK_TYPES["q2_k"]) is None


def test_extreme_values() -> None:
    """Subnormal and largest scales, zeros and one lonely weight."""
    d = torch.tensor([6e-8, 2e-5, 65504.0, 0.1, 0.1]).half().float()[:, None]
    codes = torch.randint(-8, 8, (5, 32), generator=torch.Generator().manual_seed(0))
    codes[3:] = 0
    codes[4, 7] = 5
    found = lattice.find(codes * d, BLOCK_TYPES["q4_0"])
    assert found is not None
    assert found.whole
    assert torch.equal(found.tensor.dequantize(), codes * d)


def partly(w: torch.Tensor, name: str, off: float) -> tuple[torch.Tensor, torch.Tensor]:
    """w rounded to a type except a share `off` of the blocks; returns it and where it is rounded, [out, blocks]."""
    q, block = of_llama_cpp(w, name), BLOCK_TYPES[name].block
    lies = torch.rand(w.shape[0], w.shape[1] // block, generator=torch.Generator().manual_seed(2)) >= off
    return torch.where(lies.repeat_interleave(block, 1), q.dequantize(), w), lies


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "iq4_nl", "q4_k", "q6_k"])
def test_blocks_off_the_type_are_rounded_around_those_that_stay(name: str) -> None:
    w, h = problem(64, 256)
    mixed, lies = partly(w, name, 0.05)
    qtype = BLOCK_TYPES[name]
    found = lattice.find(mixed, qtype)
    assert found is not None
    assert torch.equal(found.lies, lies)
    result = gptq(mixed, h.clone(), qtype, found=found)
    assert isinstance(result.weight, BlockTensor)
    nearest = found.over(rtn(mixed, qtype))
    for q in (result.weight, nearest):
        if name != "q6_k":
            assert torch.equal(q.codes[found.weights], of_llama_cpp(w, name).codes[found.weights])
        assert torch.equal(q.dequantize()[found.weights], mixed[found.weights])
    held = lost(result.weight.dequantize(), mixed, h)
    assert held < lost(nearest.dequantize(), mixed, h)  # the rest is rounded by GPTQ, not to nearest
    assert float(result.error.sum()) == pytest.approx(held, rel=1e-2)


# ------------------------------------------------------------------------------------------------ llmc quantize


def put_on(folder: Path, name: str, off: float = 0.0, dtype: torch.dtype = torch.float32) -> dict[str, BlockTensor]:
    """Round the linears of a folder to a type, in place, as values; returns their codes."""
    made: dict[str, BlockTensor] = {}
    with edit_tensors(folder) as tensors:
        for key in filter(is_decoder_linear, list(tensors)):
            w = tensors[key].float()
            made[key.removesuffix(".weight")] = of_llama_cpp(w, name)
            tensors[key] = partly(w, name, off)[0].to(dtype)
    return made


def codes_of(folder: Path, linear: str) -> BlockTensor:
    return quantized.as_blocks(quantized.read(Checkpoint.open(folder), linear))


def test_a_mix_of_types_keeps_each(wide_base: Callable[[str], Path], tmp_path: Path) -> None:
    """As a dequantized Q4_K_M file: the folder has llmc's blocks, the same as those that were dequantized."""
    base = Path(shutil.copytree(wide_base("llama"), tmp_path / "base"))
    made: dict[str, BlockTensor] = {}
    with edit_tensors(base) as tensors:
        for name, key in zip(cycle(["q4_k", "q5_0", "q5_k"]), filter(is_decoder_linear, list(tensors)), strict=False):
            made[key.removesuffix(".weight")] = q = of_llama_cpp(tensors[key].float(), name)
            tensors[key] = q.dequantize().half()
    result = llmc.quantize(base, out=tmp_path / "q")
    assert result["type"] == "carried"
    assert {n: c["carried"] / c["blocks"] for n, c in result["carried"].items()} == {"q4_k": 1.0, "q5_0": 1.0, "q5_k": 1.0}
    for linear, q in made.items():
        assert pack(codes_of(tmp_path / "q", linear)).tobytes() == pack(q).tobytes()


@pytest.mark.parametrize(("name", "dtype"), [("q4_0", torch.bfloat16), ("q4_0", torch.float16), ("q8_0", torch.float16),
                                             ("q4_1", torch.float32), ("q5_0", torch.float16)])
def test_a_model_on_a_type_keeps_its_codes(name: str, dtype: torch.dtype, tmp_path: Path,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    base = build("llama", tmp_path / "base", dtype=dtype)
    made = put_on(base, name, dtype=dtype)
    plan = llmc.quantize(base, dry_run=True)
    assert set(plan["on_types"].values()) == {name}
    assert len(plan["on_types"]) == len(made) == 14
    result = llmc.quantize(base, out=tmp_path / "q")  # no text: nothing is left to round
    qtype = {"q4_0": "int4-sym-g32", "q8_0": "int8-sym-g32"}.get(name, name)
    assert result["carried"] == {qtype: {"linears": 14, "blocks": 2304, "carried": 2304}}
    assert result["fallbacks"] == 0
    assert "no text is needed" in capsys.readouterr().err
    for linear, q in made.items():
        assert torch.equal(codes_of(tmp_path / "q", linear).codes, q.codes)
        if dtype != torch.bfloat16:
            assert pack(codes_of(tmp_path / "q", linear)).tobytes() == pack(q).tobytes()


def test_a_model_mostly_on_a_type(tmp_path: Path, text: Path) -> None:
    """The blocks that lie on it keep their codes; the others are rounded by the method that was asked for."""
    base = build("llama", tmp_path / "base")
    made = put_on(base, "q4_0", off=0.05)
    source = Checkpoint.open(base)
    for method in ("gptq", "rtn"):
        counts = quantize(base, settings(text, tmp_path / method, method=method))["carried"]["int4-sym-g32"]
        assert counts["linears"] == 14
        assert 0.93 < counts["carried"] / counts["blocks"] < 0.97
        for linear, q in made.items():
            w, t = source.tensor(f"{linear}.weight"), codes_of(tmp_path / method, linear)
            lies = (q.dequantize() == w).view(w.shape[0], -1, 32).all(2).repeat_interleave(32, 1)
            assert torch.equal(t.codes[lies], q.codes[lies])
            assert torch.equal(t.dequantize()[lies], w[lies])
    assert divergence(tmp_path / "gptq", base) < divergence(tmp_path / "rtn", base)
    assert quantize(base, settings(text, tmp_path / "all", method="rtn", carry=False))["carried"] == {}


def test_another_type_is_obeyed_and_said(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = build("llama", tmp_path / "base")
    put_on(base, "q8_0")
    for options in ({"bits": 4}, {"type": "q5_0"}):
        result = quantize(base, settings(text, tmp_path / "q", **options))
        assert result["carried"] == {}
        assert "14 of 14 linears lie on another type already (14 on q8_0) and are rounded again" in capsys.readouterr().err
    result = quantize(base, settings(text, tmp_path / "q", bits=8))
    assert result["carried"]["int8-sym-g32"]["carried"] == 2304


def test_from_a_gguf_file_and_back(made, tmp_path: Path) -> None:
    """A q4_0 file becomes a folder of floats, is quantized, and is exported: the same bytes, except where -d with the
    levels' negatives is the same block."""
    from gguf import GGMLQuantizationType, GGUFReader
    from gguf.quants import dequantize

    llmc.quantize(made.gguf, out=tmp_path / "q")
    llmc.export(tmp_path / "q", format="gguf", out=tmp_path / "again.gguf")
    before, after = ({t.name: t for t in GGUFReader(p).tensors} for p in (made.gguf, tmp_path / "again.gguf"))
    assert before.keys() == after.keys()
    compared = [n for n, t in before.items() if t.tensor_type.name == "Q4_0"]
    assert len(compared) == 14
    for name in compared:
        assert after[name].tensor_type.name == "Q4_0"
        old, new = (t[name].data.reshape(-1, 18) for t in (before, after))
        values = [dequantize(x, GGMLQuantizationType.Q4_0) for x in (old, new)]
        assert np.array_equal(*values), name
        d = old[:, :2].copy().view(np.float16)
        same = (values[0] == d * -8).any(1)  # only d itself gives the level -8
        assert np.array_equal(old[same], new[same]), name
        assert same.any()


def test_carried_lines_do_not_round_up() -> None:
    from llmc.compress.quantize.config import carried_lines

    counts = {"int4-sym-g32": {"linears": 7, "blocks": 100_000, "carried": 99_999}}
    assert carried_lines(counts) == "99.99 % of the blocks of 7 linears lie on int4-sym-g32: carried over\n"
    records = [{"linears": {"a": {"type": "q5_0", "carried": {"blocks": 4, "carried": 3}}, "b": {"type": "q5_0"}}}] * 2
    assert carried.count(records) == {"q5_0": {"linears": 2, "blocks": 8, "carried": 6}}
