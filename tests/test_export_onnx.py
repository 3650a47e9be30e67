"""ONNX export from end to end: every family against torch, the whole folder, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rounding import gptq_folder
from tiny import build

pytest.importorskip("onnxruntime_genai")
pytest.importorskip("onnx_ir")
import onnx
from onnx_files import FLOAT_NOISE, export, onnx_logits

import llmc
from llmc.cli import run
from llmc.errors import UserError
from llmc.export.onnx import OnnxExportConfig
from llmc.formats.manifest import hash_folder, last_artifact, read_manifest
from llmc.formats.types import IntegerType
from llmc.runtimes.onnx_model import OnnxModel
from llmc.runtimes.torch_model import TorchModel

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_torchs_logits(family: str, tmp_path: Path) -> None:
    gptq_folder(build(family, tmp_path / "m"), tmp_path / "q", IntegerType(4, 32))
    report = export(tmp_path / "q")
    assert report["logits"]["relative_error"] < FLOAT_NOISE
    assert report["logits"]["top1_agreement"] == 1.0
    assert report["generated"].startswith("The river's level rose")
    assert report["generated_tokens"] > 0


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.5, 1.7, 2.0, 2.5, 3.0],
            "long_factor": [4.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 16.0], "original_max_position_embeddings": 48}


@pytest.mark.parametrize(("family", "scaling", "context"), [
    ("phi3", LONGROPE, 48), ("llama", {"rope_type": "dynamic", "factor": 4.0}, 256)])
def test_a_rotary_embedding_that_depends_on_the_length(family: str, scaling: dict[str, Any], context: int,
                                                       tmp_path: Path) -> None:
    """It is right as far as nothing depends on the length, and the context ends there."""
    original = {"original_max_position_embeddings": 48} if family == "phi3" else {}
    folder = build(family, tmp_path / "m", rope_parameters={"rope_theta": 10000.0, **scaling}, **original)
    report = export(folder, dtype="fp32")
    assert report["logits"]["relative_error"] < FLOAT_NOISE
    assert any("changes beyond 48 tokens" in n for n in report["notes"]) == (family == "phi3")
    genai = json.loads((tmp_path / "m-onnx" / "genai_config.json").read_text())
    assert genai["model"]["context_length"] == genai["search"]["max_length"] == context
    ids = np.random.default_rng(0).integers(2, 512, context)
    ours = TorchModel(folder, context=256, threads=1).logits(ids)
    theirs = OnnxModel(tmp_path / "m-onnx", 256, 1)
    assert theirs.context == context
    assert np.abs(ours - theirs.logits(ids)).max() < 1e-4


@pytest.mark.parametrize(("dtype", "family"), [
    ("fp32", "qwen2"), ("fp16", "llama"), ("int8", "mistral"), ("fp16", "mistral")])
def test_float_models(dtype: str, family: str, tmp_path: Path) -> None:
    folder = build(family, tmp_path / "m")
    report = export(folder, dtype=dtype)
    assert report["logits"]["relative_error"] < FLOAT_NOISE, "against what the file holds"
    assert set(report["forms"]) == {"int8-sym-g32" if dtype == "int8" else dtype}
    ids = np.random.default_rng(1).integers(2, 512, 30)
    ours = TorchModel(folder, context=64, threads=1).logits(ids)
    assert np.abs(onnx_logits(tmp_path / "m-onnx", ids) - ours).max() < {"fp32": 1e-4, "fp16": 0.1, "int8": 0.5}[dtype]


def test_gguf_and_onnx_of_the_same_codes_agree(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from llmc.runtimes.llamacpp import LlamaCpp

    gptq_folder(build("llama", tmp_path / "m", hidden_size=128), tmp_path / "q", IntegerType(8, 64))
    export(tmp_path / "q")
    llmc.export(tmp_path / "q", format="gguf", out=tmp_path / "q.gguf", threads=1)
    ids = np.random.default_rng(0).integers(2, 512, 60)
    runtime = LlamaCpp(tmp_path / "q.gguf", context=64, threads=1, flash_attention=False, kv_type="f32")
    try:
        theirs = runtime.logits(ids)
    finally:
        runtime.close()
    ours = onnx_logits(tmp_path / "q-onnx", ids)
    # llama.cpp rounds activations to 8 bits where weights are quantized; the weights are the same
    assert np.sqrt(((ours - theirs) ** 2).mean() / (ours**2).mean()) < 0.05


def test_the_folder_is_whole(exported: SimpleNamespace) -> None:
    names = {p.name for p in exported.out.iterdir()}
    assert names >= {"model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json", "chat_template.jinja",
                     "llmc.json"}
    manifest = read_manifest(exported.out)
    assert manifest is not None
    assert manifest["kind"] == "onnx"
    assert manifest["outputs"] == hash_folder(exported.out)
    assert manifest["passes"][-1]["name"] == "export-onnx"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (exported.out / name).read_bytes() == (exported.q / name).read_bytes()
    model = onnx.load(exported.out / "model.onnx", load_external_data=False)
    places = {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}
    assert places == {"model.onnx.data"}


def test_it_is_the_newest_artifact(tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "m")
    report = llmc.export(folder, format="onnx", accuracy_level="0", threads=1)
    assert report["path"] == "m-onnx"
    assert last_artifact() == Path("m-onnx")
    with pytest.raises(UserError, match="is an exported folder already"):
        llmc.export(format="onnx")


def test_every_end_token_is_named(tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "m")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    export(folder)
    assert json.loads((tmp_path / "m-onnx" / "genai_config.json").read_text())["model"]["eos_token_id"] == [1, 7]


def test_the_chat_template_can_be_dropped_or_replaced(exported: SimpleNamespace, tmp_path: Path) -> None:
    export(exported.q, chat_template="drop", out=tmp_path / "without")
    assert not (tmp_path / "without" / "chat_template.jinja").exists()
    (tmp_path / "other.jinja").write_text("{{ other }}")
    report = export(exported.q, chat_template=str(tmp_path / "other.jinja"), out=tmp_path / "with")
    assert (tmp_path / "with" / "chat_template.jinja").read_text() == "{{ other }}"
    assert report["chat_template_sha256"] != exported.report["chat_template_sha256"]


def test_named_templates_become_files_and_the_tokenizer_neither_pads_nor_cuts(tmp_path: Path) -> None:
    folder, chat = build("llama", tmp_path / "m", num_hidden_layers=1), "{% for m in messages %}{{ m.content }}{% endfor %}"
    for name, values in (
        ("tokenizer_config.json", {"chat_template": [{"name": "default", "template": chat},
                                                     {"name": "tool", "template": chat + "!"}]}),
        ("tokenizer.json", {"truncation": {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}})):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))
    report, out = export(folder), tmp_path / "m-onnx"
    assert json.loads((out / "tokenizer_config.json").read_text())["chat_template"] == chat
    assert (out / "chat_template.jinja").read_text() == chat
    assert (out / "additional_chat_templates" / "tool.jinja").read_text() == chat + "!"
    assert json.loads((out / "tokenizer.json").read_text())["truncation"] is None
    counts = report["token_ids"]["chat_tokens"]
    assert counts["tool"] == counts["default"] + 1
    assert report["token_ids"]["around_added_tokens"] == {"compared": 2, "unlike": {}, "tokens": {}}
    assert llmc.verify(out)["problems"] == []


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox"])
def test_unknown_families_are_named_with_the_known_ones(family: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"llmc does not write .* as ONNX, .* does not know it; .*LlamaFor.*Phi3For"):
        export(build(family, tmp_path / "m"))
    assert not (tmp_path / "m-onnx").exists()


def test_options_of_the_other_format_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--pre belongs to --format gguf, not to onnx"):
        llmc.export(tmp_path, format="onnx", pre="gpt-2")
    with pytest.raises(UserError, match="--head-bits belongs to --format onnx, not to gguf"):
        llmc.export(tmp_path, format="gguf", head_bits=8)


def test_the_command(exported: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export", str(exported.q), "--format", "onnx", "-o", str(tmp_path / "x"), "--threads", "1"]
    assert run([*command, "--accuracy-level", "4", "--head-bits", "4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["forms"] == {"int4-sym-g32": 11}
    assert (report["accuracy_level"], report["head_accuracy_level"]) == (4, 4)
    assert run([*command, "--accuracy-level", "0", "--head-accuracy-level", "4"]) == 0
    assert "level      0, head 4: as asked; against level 0: prefill" in capsys.readouterr().out
    assert run(command) == 0
    assert "codes bit for bit" in capsys.readouterr().out
    assert run([*command, "--float-type", "f16"]) == 2, "also where the value is the default"
    assert "--float-type belongs to --format gguf" in capsys.readouterr().err


def test_options_that_contradict_the_model_are_refused(exported: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--dtype int8 has no effect"):
        export(exported.q, dtype="int8", out=tmp_path / "x")
    with pytest.raises(UserError, match=r"--accuracy-level '2' .*--head-bits 5"):
        OnnxExportConfig(accuracy_level="2", head_bits=5)


def test_the_bytes_depend_on_neither_the_process_nor_the_place(exported: SimpleNamespace, tmp_path: Path) -> None:
    code = ("import llmc, sys\n"
            "llmc.export(sys.argv[1], format='onnx', out='out', accuracy_level='4', threads=int(sys.argv[2]))")
    found, running = [], []
    for seed in ("1", "2"):  # of the order of sets, and the number of threads
        (tmp_path / f"place {seed}").mkdir()
        running.append(subprocess.Popen([sys.executable, "-P", "-c", code, exported.q, seed], cwd=tmp_path / f"place {seed}",
                                        env=os.environ | {"PYTHONHASHSEED": seed}, stderr=subprocess.PIPE, text=True))
    for process, seed in zip(running, ("1", "2"), strict=True):
        said = process.communicate()[1]
        assert process.returncode == 0, said
        found.append(hash_folder(tmp_path / f"place {seed}" / "out"))
    assert found[0] == found[1]
