"""`llmc prune` from a folder to a folder: what is measured, what a smaller model is good for, long runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import Command, resumed
from pruning import load, prune
from tiny import build, edit_config, edit_tensors, tokenizer

import llmc
from llmc.errors import UserError


def test_the_figures_are_those_of_whole_models_in_memory(tmp_path: Path, text: Path) -> None:
    from llmc.compress.prune.quality import split
    from llmc.compress.text import load_calibration

    base = build("gemma2", tmp_path / "base")
    found = prune(base, text, tmp_path / "out", method="magnitude", samples=24)["quality"]
    held = load_calibration(str(text), tokenizer(), 3, 64).sequences  # magnitude looks at none
    with torch.no_grad():
        p, q = (torch.log_softmax(load(f)(held).logits[:, 32:-1].double(), -1) for f in (base, tmp_path / "out"))
    nll = -q.gather(-1, held[:, 33:, None]).mean()
    assert found["perplexity"]["value"] == pytest.approx(float(nll.exp()), rel=1e-4)
    assert found["kld"]["value"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    seen, judged = split(torch.arange(24)[:, None], 3)
    assert sorted([*seen.flatten().tolist(), *judged.flatten().tolist()]) == list(range(24))


SMALLER = {"sparsegpt": {"sparsity": 0.5}, "depth": {"drop": 1}, "width": {"ffn": 0.75, "heads": 0.5, "hidden": 0.5}}


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
@pytest.mark.parametrize("method", SMALLER)
def test_the_result_quantizes_and_exports_to_gguf(method: str, family: str, tmp_path: Path, text: Path) -> None:
    """The export proves the file in llama.cpp against the folder's own logits."""
    base = build(family, tmp_path / "base", dtype=torch.float16)
    prune(base, text, tmp_path / "pruned", method=method, **SMALLER[method])
    llmc.export(tmp_path / "pruned", format="gguf", out="float.gguf")
    llmc.quantize(tmp_path / "pruned", method="rtn", out="small", threads=2)
    llmc.export("small", format="gguf", out="small.gguf")
    report = llmc.evaluate("float.gguf", base=tmp_path / "pruned", context=64, chunks=4)
    assert report["quality"]["texts"][0]["kld"]["value"] < 1e-3


@pytest.mark.parametrize("method", SMALLER)
def test_the_result_exports_to_onnx(method: str, tmp_path: Path, text: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    base = build("llama", tmp_path / "base", dtype=torch.float16)
    prune(base, text, tmp_path / "pruned", method=method, **SMALLER[method])
    llmc.quantize(tmp_path / "pruned", method="rtn", out="small", threads=2)
    llmc.export("small", format="onnx", out="onnx")
    assert Path("onnx/model.onnx").is_file()


@pytest.mark.parametrize("method", ["sparsegpt", "depth"])
def test_resume_after_kill_9_gives_the_same_bytes(method: str, tmp_path: Path, text: Path) -> None:
    base = build("llama", tmp_path / "base", num_hidden_layers=8)
    more = ["--drop", "6"] if method == "depth" else []
    command = Command("prune", base, "--method", method, *more, "--calibration", text, "--samples", 16, "--seq-len", 64,
                      "--threads", 2, "--json")
    done = resumed(command, tmp_path, lambda out: command.kill(out, ".killed.unfinished/layers/0001.json"),
                   left=".killed.unfinished/state.json")
    whole, again = (json.loads(d.stdout) for d in done)
    assert again["weights_sha256"] == whole["weights_sha256"]
    assert again["quality"] == whole["quality"]


@pytest.mark.parametrize("options", [{}, {"method": "wanda", "pattern": "2:4"}, {"method": "depth", "drop": 1},
                                     {"method": "width", "ffn": 0.75}])
def test_dry_run_writes_nothing(options: dict[str, Any], tmp_path: Path, text: Path) -> None:
    base = build("llama", tmp_path / "base")
    before = sorted(tmp_path.rglob("*"))
    plan = prune(base, text, tmp_path / "out", dry_run=True, **options)
    assert sorted(tmp_path.rglob("*")) == before
    assert plan["memory_bytes"] > 0
    assert plan["whole_model_in_memory"] == (options.get("method") == "depth")


def test_quantized_folders_are_refused(tmp_path: Path, text: Path) -> None:
    base = build("llama", tmp_path / "base")
    edit_config(base, quantization_config={"quant_method": "awq"})
    with edit_tensors(base) as tensors:
        tensors["model.layers.0.mlp.up_proj.qweight"] = torch.zeros(64, 16, dtype=torch.int32)
    with pytest.raises(UserError, match="quantized already"):
        prune(base, text, tmp_path / "out")


def test_the_command_line_says_what_was_lost_and_what_to_do(tmp_path: Path, text: Path) -> None:
    build("llama", tmp_path / "base", num_hidden_layers=3)
    command = [sys.executable, "-m", "llmc", "prune", "base", "--method", "depth", "--drop", "2", "--calibration", str(text),
               "--samples", "8", "--seq-len", "64"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert "removed, in this order" in done.stdout
    assert "KL divergence" in done.stdout
    assert Path("base-depth-2/llmc.json").is_file()
    bad = subprocess.run([*command, "--sparsity", "0.5"], capture_output=True, text=True)
    assert bad.returncode == 2
    assert "goes with --method magnitude" in bad.stderr
