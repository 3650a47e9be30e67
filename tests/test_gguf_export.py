"""The export from end to end: every architecture against torch, codes bit for bit, and files that must not pass."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader
from gguf.quants import dequantize
from rounding import gptq_folder
from safetensors.torch import load_file, save_file
from tiny import build, edit_config

from llmc.about.verification import verify as verify_artifact
from llmc.errors import UserError
from llmc.export.gguf import GgufExportConfig, export_gguf, verify
from llmc.export.gguf import export as pipeline
from llmc.export.gguf.plan import Types
from llmc.files import write_json
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.gguf import field
from llmc.formats.hf import load_tokenizer
from llmc.formats.manifest import last_artifact, manifest_path, new_manifest, note_last, read_manifest
from llmc.formats.types import IntegerType, QuantizedTensor
from llmc.runtimes.llamacpp import LlamaCpp
from llmc.runtimes.torch_model import TorchModel

# largest relative error of the logits; llama.cpp takes its GELU from a float16 table
FAMILIES = {"llama": 1e-4, "mistral": 1e-4, "qwen2": 1e-4, "qwen3": 1e-4, "gemma2": 1e-3, "gemma3_text": 1e-3,
            "phi3": 1e-4, "gpt2": 1e-3}


def export(folder: Path, **options: Any) -> dict[str, Any]:
    out = options.pop("out", folder.with_suffix(".gguf"))
    return export_gguf(GgufExportConfig(model=folder, out=out, threads=1, **options))


def stored(path: Path | str) -> dict[str, Any]:
    return {t.name: t for t in GGUFReader(path).tensors}


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


# ------------------------------------------------------------------------------------------------------- carried codes


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
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    tensors["model.layers.0.self_attn.o_proj.bias"] = torch.zeros(64, dtype=torch.float16)
    save_file(tensors, tmp_path / "q" / "model.safetensors", metadata={"format": "pt"})
    assert "1 biases that are all zero were left out" in export(tmp_path / "q")["notes"]


def powers_of_two(q: QuantizedTensor) -> QuantizedTensor:
    q.scales = torch.exp2(q.scales.float().log2().round()).half()
    return q


def test_asymmetric_codes_go_into_q4_1_or_nowhere(tmp_path):
    folder = build("llama", tmp_path / "m", num_hidden_layers=1)
    gptq_folder(folder, tmp_path / "q", IntegerType(4, 32, symmetric=False))
    with pytest.raises(UserError, match=r"7 layers .* float16 cannot hold exactly") as e:
        export(tmp_path / "q")
    assert "--sym" in e.value.hint
    source = gptq_folder(folder, tmp_path / "exact", IntegerType(4, 32, symmetric=False), change=powers_of_two)
    t = stored(export(tmp_path / "exact")["path"])["blk.0.attn_v.weight"]
    assert t.tensor_type == Kind.Q4_1
    expected = source["model.layers.0.self_attn.v_proj"].dequantize().numpy()
    assert np.array_equal(dequantize(t.data, Kind.Q4_1), expected)


# ----------------------------------------------------------------------------------------------------- embedding, head


def test_a_tied_model_has_one_matrix_for_both(tmp_path):
    folder = build("llama", tmp_path / "m", num_hidden_layers=1)
    gptq_folder(folder, tmp_path / "q", IntegerType(4, 32))
    report = export(tmp_path / "q")
    assert "output.weight" not in stored(report["path"])
    assert report["bytes_by_class"]["head"] == 0
    with pytest.raises(UserError, match="one matrix: it cannot be both F16 and Q8_0"):
        export(tmp_path / "q", head="f16")


def with_head(folder: Path, head: torch.Tensor) -> Path:
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = head
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_tied_is_what_is_equal_and_not_what_a_flag_says(tmp_path):
    folder = build("llama", tmp_path / "m", num_hidden_layers=1)
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    with_head(folder, embedding.clone())
    assert "output.weight" not in stored(export(folder)["path"])
    edit_config(folder, tie_word_embeddings=False)  # untied by the flag, and yet the same matrix
    assert "output.weight" not in stored(export(folder)["path"])
    with_head(folder, embedding + 1)
    assert "output.weight" in stored(export(folder)["path"])
    edit_config(folder, tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"one matrix, but its lm_head\.weight differs"):
        export(folder)


def test_a_head_that_is_missing_is_named(tmp_path):
    folder = build("llama", tmp_path / "m", num_hidden_layers=1)
    edit_config(folder, tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"there is no lm_head\.weight"):
        export(folder)


def test_embedding_and_head_have_types_of_their_own(tmp_path):
    folder = build("mistral", tmp_path / "m", num_hidden_layers=1, hidden_size=256)
    gptq_folder(folder, tmp_path / "q", IntegerType(4, 32))
    report = export(tmp_path / "q", embedding="f16", head="q6_k")
    types = {n: t.tensor_type.name for n, t in stored(report["path"]).items()}
    assert types["token_embd.weight"] == "F16"
    assert types["output.weight"] == "Q6_K"
    assert report["bytes_by_class"]["head"] == 512 * 210


def test_q6_k_of_rows_that_do_not_fit_names_the_alternatives(tmp_path):
    with pytest.raises(UserError, match=r"token_embd\.weight has rows of 64 weights and Q6_K needs a multiple of 256") as e:
        export(build("llama", tmp_path / "m", num_hidden_layers=1), embedding="q6_k")
    assert "q8_0" in e.value.hint


def test_wrong_options_are_all_named_at_once():
    with pytest.raises(UserError) as e:
        GgufExportConfig(embedding="q3", head="q9", threads=0)
    assert all(x in e.value.problem for x in ("--embedding 'q3'", "--head 'q9'", "--threads 0"))


# ------------------------------------------------------------------------------------------- files that must not pass


@pytest.mark.parametrize("name", ["blk.0.attn_q.weight", "blk.1.ffn_down.weight", "token_embd.weight",
                                  "blk.1.attn_norm.weight"])
def test_a_flipped_bit_is_found(name, tmp_path):
    gptq_folder(build("llama", tmp_path / "m"), tmp_path / "q", IntegerType(4, 32))
    export(tmp_path / "q")
    config = GgufExportConfig(model=tmp_path / "q")
    ckpt = Checkpoint.open(tmp_path / "q")
    entries = pipeline.plan_file(config, ckpt, load_tokenizer(ckpt.folder), Types.choose(config, ckpt)).entries
    file = tmp_path / "q.gguf"
    counts = verify.tensors(file, entries)
    assert counts["tensors"] == len(entries)
    t = stored(file)[name]
    data = bytearray(file.read_bytes())
    for offset, bit in ((t.data_offset, 0), (t.data_offset + t.n_bytes - 1, 7), (t.data_offset + t.n_bytes // 2, 3)):
        data[offset] ^= 1 << bit
        file.write_bytes(data)
        with pytest.raises(UserError, match=name):
            verify.tensors(file, entries)
        data[offset] ^= 1 << bit


def test_a_file_that_computes_otherwise_is_not_kept(tmp_path, monkeypatch):
    folder = build("llama", tmp_path / "m")
    monkeypatch.setattr("llmc.export.gguf.plan.interleave", lambda rows, heads: np.arange(rows))
    with pytest.raises(UserError, match="logits are not torch's"):
        export(folder, float_type="f32")
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == []


def test_a_broken_checkpoint_leaves_nothing_behind(tmp_path):
    folder = build("llama", tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="NaN or infinity"):
        export(folder)
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == []


def test_a_foreign_file_is_not_overwritten(tmp_path):
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(UserError, match="was not made by llmc"):
        export(build("llama", tmp_path / "m"))
    assert (tmp_path / "m.gguf").read_text() == "mine"


def test_an_unknown_architecture_names_the_known_ones_and_the_converter(tmp_path):
    with pytest.raises(UserError, match=r"OPTForCausalLM.*LlamaForCausalLM, MistralForCausalLM.*GPT2LMHeadModel") as e:
        export(build("opt", tmp_path / "m"))
    assert "--converter" in e.value.hint


@pytest.mark.parametrize(("family", "values", "message"), [
    ("llama", {"hidden_act": "gelu"}, "the activation = 'gelu'"),
    ("gemma2", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar = 64"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
])
def test_what_llama_cpp_does_not_compute_is_refused(family, values, message, tmp_path):
    with pytest.raises(UserError, match=message):
        export(build(family, tmp_path / "m", **values))


def test_a_sliding_window_that_llama_cpp_ignores_is_noted(tmp_path):
    report = export(build("mistral", tmp_path / "m", sliding_window=128))
    assert any("sliding window of 128" in note for note in report["notes"])


def test_a_tensor_without_a_place_is_named(tmp_path):
    folder = build("llama", tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.extra.weight": torch.ones(3)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.extra\.weight .* has no place"):
        export(folder)


@pytest.mark.parametrize("package", ["gguf", "llama_cpp"])
def test_a_missing_package_is_named_before_any_work(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"needs {package}") as e:
        export(tmp_path / "not even there")
    assert "llmc-toolkit[gguf]" in e.value.hint


# --------------------------------------------------------------------------------------------------------- provenance


CARD = "---\nlicense: apache-2.0\nbase_model: someone/origin-7b\n---\n# A model\n"


def test_provenance_of_a_float_folder(tmp_path):
    folder = build("llama", tmp_path / "tiny-one")
    (folder / "README.md").write_text(CARD)
    report = export(folder)
    reader = GGUFReader(report["path"])
    values = {k: field(reader, f"general.{k}") for k in (
        "architecture", "name", "license", "quantized_by", "base_model.count", "base_model.0.repo_url", "size_label")}
    assert values == {"architecture": "llama", "name": "tiny-one", "license": "apache-2.0", "quantized_by": "llmc",
                      "base_model.count": 1, "base_model.0.repo_url": "https://huggingface.co/someone/origin-7b",
                      "size_label": "107K"}
    assert field(reader, "general.file_type") == 1
    assert field(reader, "general.quantization_version") == 2


def test_a_licence_is_never_guessed(tmp_path, capsys):
    report = export(build("llama", tmp_path / "m"))
    assert field(GGUFReader(report["path"]), "general.license") == "unknown"
    assert "no licence found" in capsys.readouterr().err


def test_the_manifest_continues_the_chain(tmp_path):
    gptq_folder(build("llama", tmp_path / "m"), tmp_path / "q", IntegerType(4, 32))
    source = {"name": "org/base", "licence": "mit", "base_model": None, "revision": None, "files": {}}
    write_json(manifest_path(tmp_path / "q"), new_manifest("gptq", source, [{"name": "quantize", "config": {}}]))
    report = export(tmp_path / "q", embedding="f16")
    file = Path(report["path"])
    manifest = read_manifest(file)
    assert manifest is not None
    assert [p["name"] for p in manifest["passes"]] == ["quantize", "export-gguf"]
    assert manifest["passes"][1]["config"]["embedding"] == "f16"
    assert manifest["source"]["name"] == "org/base"
    assert verify_artifact(file)["problems"] == []
    reader = GGUFReader(file)
    assert field(reader, "general.license") == "mit"
    assert field(reader, "general.base_model.0.repo_url") == "https://huggingface.co/org/base"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert verify_artifact(file)["problems"]


# -------------------------------------------------------------------------------------------------------- command line


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
