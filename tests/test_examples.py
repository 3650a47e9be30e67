"""The examples do what they say."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from llmc.formats.types import IntegerType
from llmc.rounding.rtn import rtn

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rounding_error(weight: torch.Tensor) -> float:
    """What 4-bit rounding loses of a matrix, as a share of its norm."""
    w = weight.detach().float()
    return float((rtn(w, IntegerType(4, 32)).dequantize() - w).norm() / w.norm())


@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_rescale_leaves_the_function_and_the_type(tmp_path: Path, strength: float) -> None:
    """On double precision the logits are the same; weights that lay on a 4-bit type do not any more."""
    folder = tiny.build("llama", tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    decoder = {n: p for n, p in model.named_parameters() if "proj" in n}
    with torch.no_grad():
        for p in decoder.values():
            p.copy_(rtn(p.float(), IntegerType(4, 32)).dequantize())
    assert max(rounding_error(p) for p in decoder.values()) < 0.02
    ids = torch.arange(2, 60).view(1, -1)
    with torch.no_grad():
        before = model(ids).logits
        load("make_base").rescale(model, strength, seed=0)
        after = model(ids).logits
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)
    assert min(rounding_error(p) for p in decoder.values()) > 0.05, "a matrix still lies on its type"


def test_rescale_of_another_seed_is_another_model(tmp_path: Path) -> None:
    folder = tiny.build("llama", tmp_path / "m")
    weights = []
    for seed in (0, 0, 1):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        load("make_base").rescale(model, 0.25, seed)
        weights.append(model.model.layers[1].mlp.down_proj.weight.detach())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_python_example(made: SimpleNamespace, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(tiny.corpus()[-60_000:])
    command = [sys.executable, str(EXAMPLES / "quantize_and_compare.py"), str(made.base), str(tmp_path / "out"),
               "--calibration", str(text), "--samples", "8", "--context", "64", "--chunks", "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = dict(line.split(".gguf", 1) for line in done.stdout.splitlines() if ".gguf" in line)
    divergence = {name: float(rest.split()[-1]) for name, rest in rows.items()}
    assert set(divergence) == {"gptq-4bit", "rtn-4bit", "rtn-8bit"}
    assert divergence["rtn-8bit"] < divergence["gptq-4bit"]
    assert "<html" in (tmp_path / "out" / "compare.html").read_text()


@pytest.mark.skipif(sys.platform == "win32", reason="bash")
def test_demo_is_a_valid_script() -> None:
    """`make demo` runs it on the real model; here its syntax, and its commands in test_docs.py."""
    subprocess.run(["bash", "-n", str(EXAMPLES / "demo.sh")], check=True)
