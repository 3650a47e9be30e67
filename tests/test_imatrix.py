"""`llmc imatrix` against a whole model in memory, and `llmc quantize --imatrix` against plain rounding."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mixtures
import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from killing import interrupted, resumed
from tiny import build, write_text
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import llmc
from llmc.cli import run
from llmc.compress.imatrix.run import SquaresPass
from llmc.compress.text import load_calibration
from llmc.errors import UserError
from llmc.export.gguf.architectures import find_architecture
from llmc.export.gguf.config import GgufExportConfig
from llmc.export.gguf.plan import Planner, Types
from llmc.formats import quantized
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.hf import load_torch_model
from llmc.formats.imatrix import Imatrix, InputSums, read_imatrix, write_imatrix
from llmc.formats.linears import get_weight, is_linear
from llmc.formats.types import BLOCK_TYPES, IntegerType
from llmc.rounding.rtn import rtn

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2")
TEXT = {"samples": 6, "seq_len": 48}
pytestmark = pytest.mark.usefixtures("_full_precision")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "some text.txt", 30_000)


@torch.no_grad()
def sums_in_memory(folder: Path, text: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(weight [out, in], sum over tokens of the squares of its inputs [in]) of every decoder linear."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sums: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if is_linear(module) and module is not model.get_output_embeddings():
            module.register_forward_pre_hook(lambda _m, args, name=name: sums.update(
                {name: args[0].double().square().flatten(0, -2).sum(0)}))
    model(load_calibration(str(text), AutoTokenizer.from_pretrained(folder), *TEXT.values()).sequences)
    return [(get_weight(model.get_submodule(name)), found) for name, found in sums.items()]


def exported(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors that `llmc export` puts into a GGUF file, by llama.cpp's names."""
    ckpt = Checkpoint.open(folder)
    types = Types.choose(GgufExportConfig(float_type="f32"), ckpt)
    entries = Planner(ckpt, find_architecture(ckpt.config), AutoConfig.from_pretrained(folder), types,
                      GGUFWriter(None, "llama")).entries()
    found = {e.name: e.source() for e in entries}
    return {name: t for name, t in found.items() if isinstance(t, torch.Tensor)}


@pytest.mark.parametrize("family", FAMILIES)
def test_sums_are_those_of_the_whole_model_under_the_names_of_the_exported_file(
    family: str, tmp_path: Path, text: Path,
) -> None:
    folder = build(family, tmp_path / family)
    result = llmc.imatrix(folder, calibration=str(text), **TEXT, threads=1, out=tmp_path / "i.gguf")
    found = {t.name: torch.tensor(t.data) for t in GGUFReader(tmp_path / "i.gguf").tensors}
    weights = exported(folder)
    matrices = sorted(n for n, w in weights.items() if n.startswith("blk.") and w.ndim == 2)
    assert list(found) == [f"{n}{part}" for n in matrices for part in (".in_sum2", ".counts")]
    assert result["matrices"] == len(matrices)
    # a matrix is known by the sums of its columns: llama.cpp's order of rows does not change them, one of columns would
    in_memory = sums_in_memory(folder, text)
    for name in matrices:
        columns = weights[name].sum(0)
        (sums,) = [s for w, s in in_memory if len(s) == len(columns) and torch.allclose(w.sum(0), columns, atol=1e-3)]
        torch.testing.assert_close(found[f"{name}.in_sum2"].double(), sums, rtol=1e-4, atol=0)
        assert found[f"{name}.counts"].tolist() == [6 * 48]


def test_the_file_is_laid_out_as_llama_imatrix_does(tmp_path: Path, text: Path) -> None:
    llmc.imatrix(build("llama", tmp_path / "m"), calibration=str(text), **TEXT, threads=1, out=tmp_path / "i.gguf")
    reader = GGUFReader(tmp_path / "i.gguf")
    fields = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert fields == {"general.type": "imatrix", "imatrix.datasets": ["some text.txt"], "imatrix.chunk_count": 6,
                      "imatrix.chunk_size": 48}
    assert [f.types[0].name for k, f in reader.fields.items() if k.startswith("imatrix.")] == ["ARRAY", "UINT32", "UINT32"]
    assert all(t.tensor_type.name == "F32" and t.data.ndim == 1 for t in reader.tensors)
    assert {float(t.data[0]) for t in reader.tensors if t.name.endswith(".counts")} == {6 * 48}


def test_a_linear_runs_once_and_no_weight_changes(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, counts = build("llama", tmp_path / "m"), dict[int, int]()
    forward = nn.Linear.forward

    def counted(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > 1:  # not the trace, which runs one sequence
            counts[id(self)] = counts.get(id(self), 0) + 1
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    llmc.imatrix(folder, calibration=str(text), **TEXT, out=tmp_path / "i.gguf")
    assert list(counts.values()) == [1] * 14


def test_an_interrupted_run_goes_on_and_self_sampled_text_is_kept(tmp_path: Path) -> None:
    folder, options = build("llama", tmp_path / "m"), {"samples": 3, "seq_len": 24, "threads": 1}
    whole, again = resumed(partial(llmc.imatrix, folder, **options), tmp_path, interrupted(SquaresPass, "begin", layer=1),
                           suffix=".gguf")
    assert again["sha256"] == whole["sha256"]
    assert read_imatrix(tmp_path / "killed.gguf").datasets == ["self"]
    with pytest.raises(UserError, match="exists and was not made by llmc"):
        llmc.imatrix(folder, **options, out=folder / "config.json")


# ------------------------------------------------------------------------------------------------------------- reading


def lost(weight: torch.Tensor, q: Any, importance: torch.Tensor) -> float:
    return float(((q.dequantize() - weight).square() * importance).sum())


INTEGER_TYPES = (IntegerType(4, 32), IntegerType(4, 128), IntegerType(4, 64, False), IntegerType(8, 32))


@pytest.mark.parametrize("qtype", [*BLOCK_TYPES.values(), *INTEGER_TYPES], ids=lambda t: t.name)
def test_rounding_by_importance_loses_less_of_what_matters(qtype: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(48, 512, generator=generator)
    importance = torch.randn(512, generator=generator).mul(2).exp()
    weighted, plain = rtn(weight, qtype, importance), rtn(weight, qtype)
    least = 0.98 if getattr(qtype, "exponent", False) else 0.97  # few scales are powers of two
    assert lost(weight, weighted, importance) < least * lost(weight, plain, importance)
    assert lost(weight, plain, torch.ones(512)) < lost(weight, weighted, torch.ones(512))
    same, equal = rtn(weight, qtype, torch.ones(512)), quantized.encode(plain)
    assert all(torch.equal(t, equal[part]) for part, t in quantized.encode(same).items())


@pytest.mark.parametrize("qtype", [None, "q4_1", "iq4_nl"])
def test_round_trip_with_our_own_file(qtype: str | None, tmp_path: Path, text: Path) -> None:
    base = build("llama", tmp_path / "base")
    made = llmc.imatrix(base, calibration=str(text), **TEXT, threads=1, out=tmp_path / "i.gguf")
    options: dict[str, Any] = {"method": "rtn", "type": qtype, "threads": 1}
    llmc.quantize(base, **options, out=tmp_path / "plain")
    result = llmc.quantize(base, **options, imatrix=str(tmp_path / "i.gguf"), out=tmp_path / "weighted")
    assert (result["fallbacks"], result["events"], result["dead_columns"]) == (0, 0, 0)
    source, errors = Checkpoint.open(base), {}
    matrix = read_imatrix(tmp_path / "i.gguf")
    for kind in ("plain", "weighted"):
        ckpt = Checkpoint.open(tmp_path / kind)
        errors[kind] = sum(
            lost(source.tensor(f"model.layers.{i}.mlp.{ours}.weight"), quantized.read(ckpt, f"model.layers.{i}.mlp.{ours}"),
                 torch.tensor(matrix.entries[f"blk.{i}.{theirs}.weight"].sums[0]))
            for i in (0, 1) for ours, theirs in (("down_proj", "ffn_down"), ("up_proj", "ffn_up")))
    assert errors["weighted"] < errors["plain"]
    entry = json.loads((tmp_path / "weighted/llmc.json").read_text())["passes"][-1]
    assert entry["imatrix"] == {"name": "i.gguf", "sha256": made["sha256"], "datasets": ["some text.txt"],
                                "chunk_count": 6, "chunk_size": 48}
    assert entry["config"]["imatrix"] == "i.gguf"
    assert entry["calibration"]["name"] == "some text.txt"  # so that `llmc eval` can warn of an overlap
    for artifact in ("weighted", "i.gguf"):
        assert llmc.verify(tmp_path / artifact)["problems"] == []


def changed(file: Path, out: Path, **entries: InputSums | None) -> Path:
    """The matrix of a file with some entries replaced or left out; `__` in their names stands for a dot."""
    matrix = read_imatrix(file)
    new = matrix.entries | {name.replace("__", "."): e for name, e in entries.items()}
    write_imatrix(out, replace(matrix, entries={name: e for name, e in new.items() if e is not None}))
    return out


@pytest.fixture
def matrix(tmp_path: Path, text: Path) -> tuple[Path, Path]:
    """(a tiny Llama, its importance matrix)"""
    base = build("llama", tmp_path / "base")
    llmc.imatrix(base, calibration=str(text), **TEXT, threads=1, out=tmp_path / "i.gguf")
    return base, tmp_path / "i.gguf"


def test_what_no_token_reached_is_rounded_plainly_counted_and_named(
    matrix: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    base, file = matrix
    sums = read_imatrix(file).entries["blk.1.ffn_up.weight"].sums.copy()
    sums[0, :5] = 0
    odd = changed(file, tmp_path / "odd.gguf", blk__0__attn_q__weight=InputSums(np.zeros((1, 64), "f4"), np.zeros(1, "f4")),
                  blk__1__ffn_up__weight=InputSums(sums, np.array([288], "f4")))
    result = llmc.quantize(base, method="rtn", imatrix=odd, out=tmp_path / "q", threads=1)
    assert (result["events"], result["dead_columns"], result["fallbacks"]) == (1, 5, 0)
    assert "model.layers.0.self_attn.q_proj: the importance matrix saw no input but zero" in capsys.readouterr().err
    llmc.quantize(base, method="rtn", out=tmp_path / "plain", threads=1)
    q, plain = (Checkpoint.open(tmp_path / n) for n in ("q", "plain"))
    for name, equal in (("0.self_attn.q_proj", True), ("0.mlp.down_proj", False)):
        scales = f"model.layers.{name}.scales"
        assert torch.equal(q.tensor(scales), plain.tensor(scales)) == equal
    assert llmc.inspect(odd)["unseen"] == ["blk.0.attn_q.weight"]


def entry(width: int, experts: int = 1, value: float = 1.0) -> InputSums:
    return InputSums(np.full((experts, width), value, "f4"), np.ones(experts, "f4"))


@pytest.mark.parametrize(("entries", "words"), [
    ({"blk__1__attn_k__weight": None}, r"has no entry for 1 of 14 linears \(first blk.1.attn_k.weight\)"),
    ({"blk__0__ffn_down__weight": entry(96)}, "has width 96, and model.layers.0.mlp.down_proj has 128 input columns"),
    ({"blk__0__ffn_up__weight": entry(64, experts=4)}, "has 4 experts of width 64"),
    ({"blk__0__ffn_up__weight": entry(64, value=float("nan"))}, "holds values that are not sums of squares"),
    ({"blk__0__ffn_up__weight": entry(64, value=-1.0)}, "holds values that are not sums of squares"),
])
def test_a_matrix_of_another_model_is_refused(
    entries: dict[str, InputSums | None], words: str, matrix: tuple[Path, Path], tmp_path: Path,
) -> None:
    wrong = changed(matrix[1], tmp_path / "wrong.gguf", **entries)
    with pytest.raises(UserError, match=words):
        llmc.quantize(matrix[0], method="rtn", imatrix=wrong, dry_run=True)


def test_files_that_are_no_matrix_are_refused_with_the_next_step(
    made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "old.dat").write_bytes((14).to_bytes(4, "little") + b"legacy")
    for file, words in ((tmp_path / "old.dat", "--output-format gguf"), (made.gguf, "not an importance matrix"),
                        (tmp_path / "none.gguf", "cannot be read")):
        assert run(["quantize", str(made.base), "--method", "rtn", "--imatrix", str(file)]) == 2
        assert words in capsys.readouterr().err
    assert run(["quantize", str(made.base), "--imatrix", "i.gguf"]) == 2
    assert "--imatrix goes with --method rtn" in capsys.readouterr().err
    write_imatrix(tmp_path / "empty.gguf", Imatrix({}, [], 0, 0))
    with pytest.raises(UserError, match=r"holds no \.in_sum2"):
        llmc.inspect(tmp_path / "empty.gguf")


def test_families_without_a_place_in_llama_cpp_are_refused(tmp_path: Path, text: Path) -> None:
    with pytest.raises(UserError, match="does not write the architecture OPTForCausalLM"):
        llmc.imatrix(build("opt", tmp_path / "m"), calibration=str(text))


@pytest.mark.parametrize(("options", "words"), [({"samples": 0}, "--samples 0"), ({"seq_len": 1000}, "positions for 256")])
def test_bad_options(options: dict[str, int], words: str, tmp_path: Path, text: Path) -> None:
    with pytest.raises(UserError, match=words):
        llmc.imatrix(build("llama", tmp_path / "m"), calibration=str(text), **options)


def test_inspect_says_what_is_inside(matrix: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    report = llmc.inspect(matrix[1], tensors=True)
    assert (report["matrices"], report["layers"], report["tokens"], report["chunks"]) == (14, 2, 288, 6)
    assert {t["columns"] for t in report["tensors"]} == {64, 128}
    assert run(["inspect", str(matrix[1]), "--tensors"]) == 0
    page = capsys.readouterr().out
    for words in ("importance matrix", "some text.txt", "288, in 6 chunks of 48", "made from     base", "blk.1.ffn_down"):
        assert words in page
    assert run(["inspect", str(matrix[1]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["datasets"] == ["some text.txt"]
    assert report["provenance"]["passes"][0]["name"] == "imatrix"


# ------------------------------------------------------------------------------------------------------------- experts

WITH_TABLE = ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe")  # llmc knows llama.cpp's names of their tensors


@torch.no_grad()
def sums_of_experts(folder: Path, text: Path) -> dict[tuple[str, int], tuple[torch.Tensor, int]]:
    """{(llama.cpp's name, expert): (sums of squared inputs [in], tokens)} of one whole model in memory."""
    model = load_torch_model(folder)
    ids = load_calibration(str(text), AutoTokenizer.from_pretrained(folder), *TEXT.values()).sequences
    found: dict[tuple[str, int], tuple[torch.Tensor, int]] = {}

    def see(layer: int, experts: Any, x: torch.Tensor, index: torch.Tensor) -> None:
        for expert in range(8):
            rows = x[torch.where(index == expert)[0]]
            gate, up = nn.functional.linear(rows, experts.gate_up_proj[expert]).chunk(2, -1)
            inner = experts.act_fn(gate) * up
            for name, value in (("gate", rows), ("up", rows), ("down", inner)):
                found[f"blk.{layer}.ffn_{name}_exps.weight", expert] = value.double().square().sum(0), len(rows)

    for layer, module in enumerate(model.model.layers):
        module.mlp.experts.register_forward_pre_hook(lambda m, args, layer=layer: see(layer, m, args[0], args[1]))
    model(ids)
    return found


@pytest.mark.parametrize("kind", WITH_TABLE)
def test_experts_are_one_matrix_with_a_row_and_a_count_for_each(kind: str, tmp_path: Path, text: Path) -> None:
    """In llama.cpp's layout, under the names and in the order of the exported file; every token counts alike."""
    folder = mixtures.build(kind, tmp_path / kind)
    result = llmc.imatrix(folder, calibration=str(text), **TEXT, threads=1, out=tmp_path / "i.gguf")
    found = {t.name: t for t in GGUFReader(tmp_path / "i.gguf").tensors}
    stacks = {n: w for n, w in exported_shapes(folder).items() if "_exps" in n}
    assert len(stacks) == 6
    assert result["matrices"] * 2 == len(found)
    expected = sums_of_experts(folder, text)
    for name, (experts, _, width) in stacks.items():
        sums, counts = found[f"{name}.in_sum2"], found[f"{name}.counts"]
        assert (list(sums.shape), list(counts.shape)) == ([width, experts], [1, experts])  # ggml's order
        for expert in range(experts):
            wanted, tokens = expected[name, expert]
            torch.testing.assert_close(torch.tensor(sums.data[expert]).double(), wanted, rtol=1e-3, atol=1e-6)
            assert counts.data[expert].tolist() == [tokens]
        assert counts.data.sum() == 6 * 48 * 2  # two experts a token


def exported_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of what `llmc export` puts into a GGUF file, by llama.cpp's names."""
    ckpt = Checkpoint.open(folder)
    types = Types.choose(GgufExportConfig(float_type="f32"), ckpt)
    return {e.name: e.shape for e in Planner(ckpt, find_architecture(ckpt.config), AutoConfig.from_pretrained(folder), types,
                                             GGUFWriter(None, "llama")).entries()}


def test_each_expert_is_rounded_by_its_own_importance(tmp_path: Path, text: Path) -> None:
    """Against rounding in memory; an expert without tokens is rounded as without a matrix, and the record says so."""
    folder = mixtures.build("qwen3_moe", tmp_path / "m")
    llmc.imatrix(folder, calibration=str(text), **TEXT, threads=1, out=tmp_path / "i.gguf")
    matrix = read_imatrix(tmp_path / "i.gguf")
    name = "blk.1.ffn_down_exps.weight"
    generator = np.random.default_rng(0)
    sums = np.exp(2 * generator.standard_normal(matrix.entries[name].sums.shape)).astype(np.float32)
    counts = np.full(8, 5.0, np.float32)
    sums[3], counts[3] = 0, 0
    entries = {**matrix.entries, name: InputSums(sums, counts)}
    write_imatrix(tmp_path / "odd.gguf", replace(matrix, entries=entries))
    assert llmc.inspect(tmp_path / "odd.gguf")["unseen"] == [f"expert 3 of {name}"]
    llmc.quantize(folder, method="rtn", type="iq4_nl", imatrix=tmp_path / "odd.gguf", threads=1, out=tmp_path / "q")
    made, ckpt = Checkpoint.open(tmp_path / "q"), Checkpoint.open(folder)
    for expert in range(8):
        linear = f"model.layers.1.mlp.experts.{expert}.down_proj"
        by = None if expert == 3 else torch.from_numpy(sums[expert] / float(sums[expert].mean(dtype="float64")))
        wanted = rtn(ckpt.tensor(f"{linear}.weight").float(), BLOCK_TYPES["iq4_nl"], by)
        assert torch.equal(quantized.read(made, linear).dequantize(), wanted.dequantize())
    record = json.loads((tmp_path / "q" / "llmc.json").read_text())["passes"][0]["layers"][1]
    assert [e for e in record["events"] if "mlp.experts.3.down_proj" in e and "no input but zero" in e]

    few = replace(matrix, entries={**entries, name: InputSums(sums[:4], counts[:4])})
    write_imatrix(tmp_path / "few.gguf", few)
    with pytest.raises(UserError, match=r"has 4 experts of width 64, .* has 64 input columns and is one of 8 experts"):
        llmc.quantize(folder, method="rtn", imatrix=tmp_path / "few.gguf", out=tmp_path / "no")
