"""The KV cache: its bytes against caches that really are there, and its types in eval, bench and compare."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny

import llmc
from llmc.cli import run
from llmc.errors import UserError
from llmc.evals.bench.config import BenchConfig
from llmc.evals.compare.config import CompareConfig
from llmc.evals.compare.run import compare
from llmc.evals.quality.config import EvalConfig
from llmc.evals.report.store import kv_type, read_report
from llmc.formats import kv
from llmc.formats.artifacts.table import artifact_at
from llmc.runtimes.onnx_model import OnnxModel
from llmc.runtimes.open import open_runtime
from llmc.runtimes.torch_model import TorchModel


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "opt", "gpt_neox", "gemma2", "gemma3_text"])
def test_bytes_are_those_of_a_real_cache(family: str, tmp_path: Path) -> None:
    """Below the window torch's cache holds every token of every layer."""
    folder = tiny.build(family, tmp_path / "m")
    if family in ("gpt2", "opt", "gpt_neox"):  # tiny gives every family the key; these do not know it
        tiny.edit_config(folder, num_key_value_heads=None)
    known = artifact_at(folder).kv_shape()
    assert known is not None
    runtime = TorchModel(folder, 64, 1)
    tokens = 20
    runtime.prefill(np.arange(tokens))
    held = sum(t.nbytes for layer in runtime._cache.layers for t in (layer.keys, layer.values))
    assert kv.bytes_at(known, tokens, runtime.kv_type) == held


def test_sliding_layers_stop_at_their_window(tmp_path: Path) -> None:
    known = artifact_at(tiny.build("gemma3_text", tmp_path / "m")).kv_shape()
    assert known is not None
    assert (known["layers"], known["sliding_layers"], known["window"]) == (3, 2, 32)
    one = 2 * known["kv_heads"] * known["head_dim"] * 2
    assert kv.bytes_at(known, 100, "f16") == one * (100 + 2 * 32)


def test_every_format_tells_the_same(made: SimpleNamespace, tmp_path: Path) -> None:
    onnx = tmp_path / "onnx"
    llmc.export(made.gptq, format="onnx", out=onnx)
    folder, *others = (kv.described(artifact_at(p).kv_shape()) for p in (made.base, made.gptq, made.gguf, onnx))
    assert folder is not None
    assert others == [folder] * 3
    assert folder["bytes_per_token_f16"] == 2 * 2 * 2 * 16 * 2
    assert folder["bytes_at"]["2048"] == 2048 * folder["bytes_per_token_f16"]
    runtime = OnnxModel(onnx, 64, 1)
    assert kv.bytes_at(folder, 64, runtime.kv_type) == runtime.describe()["kv"]["bytes"]
    with pytest.raises(UserError, match=r"--kv q8_0: the KV cache of this artifact in onnxruntime is f\d\d"):
        open_runtime(onnx, 64, 1, kv="q8_0")


def test_what_is_not_told_is_not_guessed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64,
                                                      "kv_lora_rank": 512}))
    assert kv.described(artifact_at(tmp_path).kv_shape()) is None
    assert kv.section(None, "f16") == {"type": "f16", "bytes_per_token": None, "bytes_at": None}
    assert "unknown" in kv.section_text(kv.section(None, "f16"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .gguf file whose heads are 32 wide, as blocks of Q8_0 want."""
    folder = tmp_path_factory.mktemp("wide")
    base = tiny.build("qwen3", folder / "base")
    llmc.export(base, format="gguf", out=folder / "wide.gguf")
    return folder / "wide.gguf"


def settings(text: str) -> dict[str, object]:
    return {"text": text, "context": 64, "chunks": 3, "threads": 1}


def test_a_quantized_cache_has_a_divergence_of_its_own(wide: Path) -> None:
    tiny.write_text(Path("text.txt"), 20_000)
    for type, lossy in (("f16", False), ("q8_0", True)):
        r = llmc.evaluate(wide, base=wide, kv=type, out=f"{type}.json", **settings("text.txt"))
        assert r["quality"]["kv"]["type"] == r["quality"]["runtime"]["kv_type"] == type
        assert r["quality"]["base"]["runtime"]["kv_type"] == "f16", "the base keeps its own"
        kld = r["quality"]["texts"][0]["kld"]["value"]
        assert (0 < kld < 0.05) if lossy else kld == 0
    half, eighth = (read_report(Path(f"{t}.json"))["quality"]["kv"] for t in ("f16", "q8_0"))
    assert eighth["bytes_per_token"] * 32 == half["bytes_per_token"] * 17

    found = compare(CompareConfig((Path("f16.json"), Path("q8_0.json"))))  # one file, two candidates
    assert [a["name"] for a in found["artifacts"]] == ["wide.gguf", "wide.gguf (KV q8_0)"]
    assert found["artifacts"][1]["differences"]["texts"][0]["kld"]["value"] > 0
    with pytest.raises(UserError, match="with a KV cache in f16, not q8_0"):
        llmc.evaluate(wide, kv="q8_0", out="f16.json", **settings("text.txt"))
    assert kv_type(read_report(Path("f16.json"))) == "f16"


def test_benches_join_the_quality_of_the_same_cache(wide: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write_text(Path("text.txt"), 20_000)
    llmc.evaluate(wide, base=wide, kv="q8_0", out="r.json", **settings("text.txt"))
    options = ["--prompt", "9", "--generate", "2", "--warmup", "0", "--threads", "1", "--max-repetitions", "5"]
    assert run(["bench", str(wide), *options, "-o", "r.json"]) == 2
    assert "with a KV cache in q8_0, not f16" in capsys.readouterr().err
    assert run(["bench", str(wide), *options, "--kv", "q8_0", "-o", "r.json"]) == 0
    assert "KV cache             q8_0: " in capsys.readouterr().out
    both = read_report(Path("r.json"))
    assert both["quality"]
    assert both["speeds"]["local-cpu"]["kv"]["type"] == "q8_0"


def test_a_runtime_without_the_type_refuses(made: SimpleNamespace) -> None:
    with pytest.raises(UserError, match="--kv q8_0: the KV cache of this artifact in torch is f32"):
        open_runtime(made.gptq, 64, 1, kv="q8_0")
    with pytest.raises(UserError, match="cannot make a context of 64 tokens and a KV cache in q8_0"):
        open_runtime(made.gguf, 64, 1, kv="q8_0")  # its heads are 16 wide
    for cls, first in ((EvalConfig, "a"), (BenchConfig, ("a",))):
        with pytest.raises(UserError, match="--kv 'q4_0' is not known"):
            cls(first, kv="q4_0")


def test_inspect_tells(made: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(made.gguf)]) == 0
    assert "KV cache      f16: 256 B a token, 524.3 kB at 2048" in capsys.readouterr().out
