"""The export from end to end: every architecture against torch, codes bit for bit, and what has no place."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from gguf_files import export, stored
from rounding import gptq_folder
from safetensors.torch import load_file
from tiny import build, edit_tensors

from llmc.errors import UserError
from llmc.formats.manifest import last_artifact, note_last
from llmc.formats.types import IntegerType
from llmc.runtimes.llamacpp import LlamaCpp
from llmc.runtimes.torch_model import TorchModel

# largest relative error of the logits; llama.cpp takes its GELU from a float16 table
FAMILIES = {"llama": 1e-4, "mistral": 1e-4, "qwen2": 1e-4, "qwen3": 1e-4, "gemma2": 1e-3, "gemma3_text": 1e-3,
            "phi3": 1e-4, "gpt2": 1e-3}


def logits_of(folder: Path, file: Path, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same ids through the two runtimes that evaluation uses, independently of the exporter's own check."""
    theirs = LlamaCpp(file, context=256, threads=1, flash_attention=False, kv_type="f32")
    ours = TorchModel(folder, context=256, threads=1)
    try:
        return ours.logits(ids), theirs.logits(ids)
    finally:
        theirs.close()
        ours.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_f32_gives_torchs_logits(family, tmp_path):
    folder = build(family, tmp_path / "m")
    report = export(folder, float_type="f32")
    assert report["logits"]["relative_error"] < FAMILIES[family]
    assert report["logits"]["top1_agreement"] == 1.0
    assert report["tensor_types"] == {"F32": report["verified"]["tensors"]}
    ours, theirs = logits_of(folder, tmp_path / "m.gguf", np.random.default_rng(0).integers(2, 512, 100))
    assert np.abs(ours - theirs).max() < 20 * FAMILIES[family] * np.abs(ours).max()


@pytest.mark.parametrize("float_type", ["f16", "bf16", "q8_0"])
def test_float_types(float_type, tmp_path):
    folder = build("mistral", tmp_path / "m", dtype=torch.bfloat16)
    report = export(folder, float_type=float_type)
    assert report["file_type"] == float_type.upper()
    tensors = stored(report["path"])
    assert {t.tensor_type.name for n, t in tensors.items() if t.n_elements > 64} == {float_type.upper()}
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].float().numpy()
    got = dequantize(tensors["token_embd.weight"].data, Kind[float_type.upper()]).reshape(embedding.shape)
    exact = float_type == "bf16"
    assert np.array_equal(got, embedding) if exact else np.allclose(got, embedding, atol=0.005)


def interleaved(x: np.ndarray, heads: int) -> np.ndarray:
    """Row i of the file, by the definition of the two ways to rotate: 2i and 2i + 1 are i and i + d/2 of transformers."""
    d = x.shape[0] // heads
    return np.stack([x[h * d + (i // 2) + (i % 2) * (d // 2)] for h in range(heads) for i in range(d)])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_gptq_codes_are_carried_bit_for_bit(bits, group_size, tmp_path):
    folder = build("llama", tmp_path / "m", hidden_size=128)
    source = gptq_folder(folder, tmp_path / "q", IntegerType(bits, group_size))
    report = export(tmp_path / "q")
    assert report["verified"]["code_weights"] == sum(q.codes.numel() for q in source.values())
    kind = Kind.Q4_0 if bits == 4 else Kind.Q8_0
    tensors = stored(report["path"])
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down"}
    for linear, q in source.items():
        layer, name = linear.removeprefix("model.layers.").split(".", 1)
        t = tensors[f"blk.{layer}.{names[name]}.weight"]
        assert t.tensor_type == kind
        expected = q.dequantize().numpy()
        if name.endswith(("q_proj", "k_proj")):
            expected = interleaved(expected, 4 if name.endswith("q_proj") else 2)
        assert np.array_equal(dequantize(t.data, kind), expected)


@pytest.mark.parametrize(("family", "names"), [
    ("phi3", {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"}),
    ("gpt2", {"attn.c_attn": "attn_qkv", "mlp.c_proj": "ffn_down"}),
])
def test_fused_and_transposed_linears_keep_their_codes(family, names, tmp_path):
    source = gptq_folder(build(family, tmp_path / "m"), tmp_path / "q", IntegerType(4, 32))
    report = export(tmp_path / "q")
    assert report["verified"]["code_tensors"] == len(source)
    tensors = stored(report["path"])
    prefix = "transformer.h" if family == "gpt2" else "model.layers"
    for hf, gguf in names.items():
        expected = source[f"{prefix}.1.{hf}"].dequantize().numpy()
        assert np.array_equal(dequantize(tensors[f"blk.1.{gguf}.weight"].data, Kind.Q4_0), expected)


def test_linears_that_were_not_quantized_stay_float(tmp_path):
    folder = build("qwen2", tmp_path / "m")
    gptq_folder(folder, tmp_path / "q", IntegerType(4, 32), lambda n: ".layers.0.mlp" in n and n.endswith(".weight"))
    types = export(tmp_path / "q", float_type="f32")["tensor_types"]
    assert types == {"Q4_0": 3, "Q8_0": 1, "F32": 22}


def test_zero_biases_of_autogptq_are_left_out(tmp_path):
    folder = build("qwen3", tmp_path / "m")
    gptq_folder(folder, tmp_path / "q", IntegerType(4, 32))
    with edit_tensors(tmp_path / "q") as tensors:
        tensors["model.layers.0.self_attn.o_proj.bias"] = torch.zeros(64, dtype=torch.float16)
    assert "1 biases that are all zero were left out" in export(tmp_path / "q")["notes"]


def test_asymmetric_codes_go_into_q5_0(tmp_path):
    folder = build("llama", tmp_path / "m", num_hidden_layers=1)
    source = gptq_folder(folder, tmp_path / "q", IntegerType(4, 32, symmetric=False))
    t = stored(export(tmp_path / "q")["path"])["blk.0.attn_v.weight"]
    assert t.tensor_type == Kind.Q5_0
    expected = source["model.layers.0.self_attn.v_proj"].dequantize().numpy()
    assert np.array_equal(dequantize(t.data, Kind.Q5_0), expected)


@pytest.mark.parametrize("package", ["gguf", "llama_cpp"])
def test_a_missing_package_is_named_before_any_work(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"needs {package}") as e:
        export(tmp_path / "not even there")
    assert "llmc-toolkit[gguf]" in e.value.hint


def run(*args: str) -> None:
    from llmc.cli.export import register

    app = typer.Typer()
    register(app)
    app(list(args), standalone_mode=False)


def test_with_no_model_the_newest_one_is_exported_and_named(tmp_path, capsys):
    gptq_folder(build("llama", tmp_path / "base"), tmp_path / "small", IntegerType(4, 32))
    note_last(tmp_path / "small", "gptq")
    run("--json", "--threads", "1")
    out = capsys.readouterr()
    report = json.loads(out.out)
    assert report["path"] == "small-Q4_0.gguf"
    assert Path("small-Q4_0.gguf").stat().st_size == report["bytes"]
    assert "exporting small, the newest model made in this folder" in out.err
    assert last_artifact() == Path("small-Q4_0.gguf")
    with pytest.raises(UserError, match="is a file already"):
        run("--threads", "1")


def test_the_summary_says_what_was_proved(tmp_path, capsys):
    run(str(build("llama", tmp_path / "m")), "--out", str(tmp_path / "x.gguf"), "--float-type", "f32", "--threads", "1")
    text = capsys.readouterr().out
    assert f"{tmp_path / 'x.gguf'}: " in text
    assert "106,816 weights equal their source" in text
    assert "top-1 agreement 100.0% over 128 tokens" in text
