"""A damaged .gguf file is one clear error in every command: no abort of llama.cpp, no traceback, no hang."""

from __future__ import annotations

import os
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
from gguf.constants import GGML_QUANT_SIZES
from gguf_files import checkout, copy

import llmc
from llmc.errors import UserError
from llmc.export.gguf import GgufExportConfig, export_gguf, run_converter
from llmc.formats.gguf_check import check_runnable, parts
from llmc.formats.gguf_header import TYPES, Array, read_header
from llmc.runtimes import trial
from llmc.runtimes.base import NoTokenizerError
from llmc.runtimes.open import open_runtime


def test_the_header_is_what_the_gguf_package_reads(made: SimpleNamespace) -> None:
    ours, theirs = read_header(made.gguf), gguf.GGUFReader(made.gguf)
    assert {t.name: (t.shape, t.kind, t.start, t.nbytes) for t in ours.tensors} == {
        t.name: (tuple(map(int, t.shape)), int(t.tensor_type), int(t.data_offset), int(t.n_bytes)) for t in theirs.tensors}
    read = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert {k: v.count if isinstance(v, Array) else v for k, v in ours.fields.items()} == {
        k: len(v) if isinstance(v, list) else v for k, v in read.items()}
    check_runnable(made.gguf)


def test_every_type_of_ggml_is_known() -> None:
    assert {int(k): v for k, v in GGML_QUANT_SIZES.items()} == TYPES


@pytest.mark.parametrize(("change", "problem"), [
    ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, r"layer_norm_rms_epsilon is nan"),
    ({"llama.attention.layer_norm_rms_epsilon": ("1e-5", gguf.GGUFValueType.STRING, None)}, "is '1e-5', not a small number"),
    ({"llama.block_count": 3}, "block_count is 3, and the file has 2 layers, 0 to 1"),
    ({"llama.block_count": (2.5, gguf.GGUFValueType.FLOAT32, None)}, "block_count is 2.5, not a whole number"),
    ({"llama.block_count": 10**9}, "not a whole number up to 4,096"),
    ({"llama.embedding_length": 96}, "embedding_length is 96, and token_embd.weight has rows of 64"),
    ({"tokenizer.ggml.tokens": (["a", "b"], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING)},
     "the tokenizer has 2 tokens and the embedding 512 rows"),
    ({"tokenizer.ggml.tokens": ([1, 2], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32)}, "tokens is not a list of tex"),
    ({"tokenizer.ggml.token_type": ([1.0] * 512, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.FLOAT32)}, "token_type is not"),
    ({"tokenizer.ggml.token_type": ([1], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32)}, "one for each token"),
    ({"tokenizer.ggml.eos_token_id": 100_000}, "eos_token_id is 100000, and there are 512 tokens"),
])
def test_metadata_at_which_llama_cpp_may_abort(made: SimpleNamespace, tmp_path: Path, change: dict[str, Any],
                                               problem: str) -> None:
    file = copy(made.gguf, tmp_path / "odd.gguf", change)
    for command in (lambda: llmc.generate(file, "a", max_tokens=1), lambda: llmc.bench(file, prompt=4, generate=1),
                    lambda: llmc.evaluate(file, base=made.base, context=32, chunks=1), lambda: llmc.quantize(file, out="q")):
        with pytest.raises(UserError, match=problem):
            command()
    assert any(problem.split()[0] in p for p in llmc.verify(file)["problems"])
    assert llmc.inspect(file)["format"].startswith("GGUF")


def test_every_byte_of_the_header_may_be_wrong(made: SimpleNamespace, tmp_path: Path) -> None:
    """Flipped bytes and cut files are read, or refused with the file's name: nothing else."""
    whole = made.gguf.read_bytes()
    first = min(t.start for t in read_header(made.gguf).tensors)
    rng = np.random.default_rng(0)
    file, refused, read = tmp_path / "odd.gguf", 0, 0
    for i in range(400):
        data = bytearray(whole[: int(rng.integers(0, first))] if i % 4 == 0 else whole)
        for _ in range(0 if i % 4 == 0 else 1 + i % 3):
            data[int(rng.integers(0, first)) if i % 2 else int(rng.integers(0, 2000))] = int(rng.integers(0, 256))
        file.write_bytes(data)
        try:
            check_runnable(file)
        except UserError as e:
            refused += str(file) in e.problem
        else:
            read += 1
    assert read + refused == 400
    assert refused > 200


@pytest.mark.parametrize(("at", "value", "problem"), [
    (0, b"GGML", "does not begin with GGUF"), (4, struct.pack("<I", 1), "it has version 1"),
    (8, struct.pack("<Q", 1 << 60), "cannot hold"), (24, struct.pack("<Q", 1 << 62), "a text at byte"),
])
def test_a_damaged_beginning(made: SimpleNamespace, tmp_path: Path, at: int, value: bytes, problem: str) -> None:
    data = bytearray(made.gguf.read_bytes())
    data[at : at + len(value)] = value
    (tmp_path / "odd.gguf").write_bytes(data)
    for command in (llmc.inspect, lambda f: open_runtime(f, 8, 1)):
        with pytest.raises(UserError, match=problem):
            command(tmp_path / "odd.gguf")


def test_a_file_without_a_tokenizer_is_measured_with_the_bases(made: SimpleNamespace, tmp_path: Path,
                                                               capsys: pytest.CaptureFixture[str]) -> None:
    lacking = {k: None for k in gguf.GGUFReader(made.gguf).fields if k.startswith("tokenizer.")}
    file = copy(made.gguf, tmp_path / "none.gguf",
                {**lacking, "tokenizer.ggml.model": ("none", gguf.GGUFValueType.STRING, None)})
    whole, bare = (llmc.evaluate(f, base=made.base, context=32, chunks=1)["quality"] for f in (made.gguf, file))
    assert bare["texts"][0]["perplexity"] == whole["texts"][0]["perplexity"]
    assert bare["tokenizer_agrees"] is False
    assert "none.gguf holds no tokenizer" in capsys.readouterr().err
    with pytest.raises(NoTokenizerError, match="holds no tokenizer"):
        llmc.generate(file, "a", max_tokens=1)
    with pytest.raises(UserError, match="holds no tokenizer"):
        llmc.bench(file, prompt=4, generate=1)


# ------------------------------------------------------------------------------------------------------------- split files


@pytest.fixture
def split(made: SimpleNamespace, tmp_path: Path) -> list[Path]:
    copy(made.gguf, tmp_path / "m.gguf", {}, split=8)
    return sorted(tmp_path.glob("m-*.gguf"))


def test_all_parts_of_a_split_file_are_counted(made: SimpleNamespace, split: list[Path]) -> None:
    assert parts(split[0]) == split
    assert len(split) > 1
    whole, found = (llmc.inspect(f)["weights"] for f in (made.gguf, split[0]))
    assert {**found, "file_bytes": 0} == {**whole, "file_bytes": 0}
    assert found["file_bytes"] == sum(p.stat().st_size for p in split)
    both = [llmc.evaluate(f, base=made.base, context=32, chunks=1)["quality"]["texts"][0] for f in (made.gguf, split[0])]
    assert both[0]["perplexity"] == both[1]["perplexity"]
    with pytest.raises(UserError, match="the first of") as e:
        llmc.quantize(split[0], method="rtn", out="q")
    assert "llama-gguf-split --merge" in e.value.hint


def test_parts_that_are_missing_or_alone(split: list[Path]) -> None:
    with pytest.raises(UserError, match="its metadata are in the first part") as e:
        llmc.inspect(split[1])
    assert split[0].name in e.value.hint
    other = split[0].rename(split[0].with_name("renamed.gguf"))
    with pytest.raises(UserError, match="its name must end in -00001-of-"):
        open_runtime(other, 8, 1)
    other.rename(split[0])
    split[-1].unlink()
    with pytest.raises(UserError, match="are missing") as e:
        llmc.inspect(split[0])
    assert split[-1].name in e.value.problem


# ------------------------------------------------------------------------------------------------- death in a child


@pytest.mark.parametrize("how", ["os.abort()", "os.kill(os.getpid(), 11)"])
def test_a_runtime_that_dies_is_one_error(made: SimpleNamespace, tmp_path: Path, how: str,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """The child dies, this process does not. Files that llmc made are not tried."""
    file = Path(shutil.copy(made.gguf, tmp_path / "m.gguf"))
    before = subprocess.run
    monkeypatch.setattr(trial.subprocess, "run", lambda args, **more: before(
        [sys.executable, "-c", f"import os, sys; print('GGML_ASSERT(x)', file=sys.stderr, flush=True); {how}"], **more))
    code = signal.SIGABRT if "abort" in how else signal.SIGSEGV
    with pytest.raises(UserError, match=rf"died of .*m\.gguf: signal {int(code)} \({code.name}\) \(GGML_ASSERT\(x\)\)"):
        llmc.generate(file, "a", max_tokens=1)
    assert llmc.generate(made.gguf, "a", max_tokens=1)["tokens"] == 1


def test_a_runtime_that_hangs_is_one_error(made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "PATIENCE", 0.01)
    with pytest.raises(UserError, match="did not answer in 0 seconds"):
        trial.try_first(Path(shutil.copy(made.gguf, tmp_path / "m.gguf")))


def test_a_good_file_from_elsewhere_is_tried_and_runs(made: SimpleNamespace, tmp_path: Path) -> None:
    file = Path(shutil.copy(made.gguf, tmp_path / "m.gguf"))
    assert llmc.generate(file, "a", max_tokens=2)["text"] == llmc.generate(made.gguf, "a", max_tokens=2)["text"]


# ------------------------------------------------------------------------------------------------------------------ export


def test_what_llama_cpp_would_refuse_is_told_before_weights_are_written(tmp_path: Path) -> None:
    folder = tiny.build("llama", tmp_path / "m")
    text = (folder / "config.json").read_text()
    for old, new, problem in (('"num_hidden_layers": 2', '"num_hidden_layers": 3', "block_count is 3, and the file has 2"),):
        (folder / "config.json").write_text(text.replace(old, new))
        with pytest.raises(UserError, match=problem) as e:
            llmc.export(folder, format="gguf", out=tmp_path / "m.gguf")
        assert "config.json" in e.value.hint
    assert [p.name for p in tmp_path.glob("*.gguf*")] == []


def test_biases_that_llama_cpp_does_not_know(tmp_path: Path) -> None:
    folder = tiny.build("qwen3", tmp_path / "m", attention_bias=True)
    weights = tiny.load_file(folder / "model.safetensors")
    tiny.save_file({k: v + 0.1 if k.endswith("bias") else v for k, v in weights.items()}, folder / "model.safetensors",
                   metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"llama\.cpp's architecture 'qwen3'.*wrong number of tensors") as e:
        llmc.export(folder, format="gguf", out=tmp_path / "m.gguf")
    assert "--format onnx" in e.value.hint
    assert list(tmp_path.glob("*.gguf*")) == []


@pytest.mark.parametrize(("change", "problem"), [
    ("import os; os.abort()", r"failed on m \(signal 6\)"), ("import time; time.sleep(60)", "did not end on m in 2 seconds"),
    ("sys.exit('error: unrecognized arguments: --outtype')", "unrecognized arguments: --outtype"),
    ("open(out, 'wb').write(b'GGUF'); sys.exit(0)", "wrote a damaged file: .*half a download"),
    ("print('x' * 100_000, file=sys.stderr); sys.exit(3)", r"\(code 3\): x{1000}"),
])
def test_a_converter_that_dies_or_hangs(tmp_path: Path, change: str, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_converter, "PATIENCE", 2 if "sleep" in change else 600)
    with pytest.raises(UserError, match=problem):
        export_gguf(GgufExportConfig(model=tiny.build("llama", tmp_path / "m"), out=tmp_path / "m.gguf",
                                     converter=checkout(tmp_path / "llama.cpp", change), threads=1))
    assert sorted(os.listdir(tmp_path)) == ["llama.cpp", "m"]
