"""The one writer of model folders: what goes along and what does not, and that a folder written wrongly never passes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import build

from llmc.formats import model_folder
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.manifest import hash_folder, read_manifest
from llmc.formats.shards import pieces_of, rest_of

LICENCE, TEMPLATE = b"be nice\n", "{{ messages }}"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = build("llama", tmp_path / "source")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(TEMPLATE)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    (folder / "LICENSE").write_bytes(LICENCE)
    (folder / "optimizer.pt").write_bytes(b"a pickle")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "modeling_own.py").write_text("raise SystemExit")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"another model")
    return folder


def accept(written: Checkpoint) -> None:
    pass


def test_what_goes_along(source: Path, tmp_path: Path) -> None:
    checkpoint, out = Checkpoint.open(source), tmp_path / "out"
    pieces = rest_of(checkpoint, ())
    written = model_folder.write(out, source, pieces, None, model_folder.same_bytes(pieces))
    assert written.folder == out
    expected = {p for p in hash_folder(source) if p not in ("optimizer.pt", "pytorch_model.bin", "modeling_own.py",
                                                           "onnx/model.onnx", "llmc.json")}
    assert set(hash_folder(out)) == expected
    assert {"additional_chat_templates/tool_use.jinja", "chat_template.jinja", "chat_template.json", "LICENSE"} <= expected
    for name in expected - {"model.safetensors"}:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    before, after = (load_file(f / "model.safetensors") for f in (source, out))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)


@pytest.mark.parametrize("method", ["gptq", "llmc-blocks"])
def test_quantize_config_repeats_gptqs_settings(source: Path, tmp_path: Path, method: str) -> None:
    checkpoint, quantization = Checkpoint.open(source), {"quant_method": method, "bits": 4}
    config = {**checkpoint.config, "quantization_config": quantization}
    model_folder.write(tmp_path / "out", source, rest_of(checkpoint, ()), config, accept)
    copy = tmp_path / "out" / "quantize_config.json"
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config
    assert copy.is_file() == (method == "gptq")
    assert not copy.is_file() or json.loads(copy.read_text()) == quantization


@pytest.mark.parametrize("wrong", ["lost", "another type", "another shape", "more"])
def test_a_folder_that_is_not_what_was_meant_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str,
) -> None:
    name, write = "model.norm.weight", model_folder.write_checkpoint

    def writes_wrongly(folder: Path, pieces: list[object]) -> None:
        write(folder, pieces)  # type: ignore[arg-type]
        tensors = load_file(folder / "model.safetensors")
        norm = tensors.pop(name)
        tensors |= {"lost": {}, "another type": {name: norm.double()}, "another shape": {name: norm[:-1]},
                    "more": {name: norm, "model.norm.more": norm.clone()}}[wrong]
        save_file(tensors, folder / "model.safetensors")

    monkeypatch.setattr(model_folder, "write_checkpoint", writes_wrongly)
    with pytest.raises(RuntimeError, match=r"model\.norm\..* was not written as it was computed"):
        model_folder.write(tmp_path / "out", source, rest_of(Checkpoint.open(source), ()), None, accept)


def test_a_flipped_bit_is_found(source: Path, tmp_path: Path) -> None:
    pieces = rest_of(Checkpoint.open(source), ())
    written = model_folder.write(tmp_path / "out", source, pieces, None, accept)
    model_folder.same_bytes(pieces)(written)
    last = pieces_of(tmp_path / "out" / "model.safetensors")[-1]
    with (tmp_path / "out" / "model.safetensors").open("r+b") as f:
        f.seek(last.offset + last.nbytes - 1)
        byte = f.read(1)[0]
        f.seek(last.offset + last.nbytes - 1)
        f.write(bytes([byte ^ 1]))
    with pytest.raises(RuntimeError, match=f"{last.name} was not written"):
        model_folder.same_bytes(pieces)(written)


def test_published_with_its_manifest(source: Path, tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    model_folder.write(work, source, rest_of(Checkpoint.open(source), ()), None, accept)
    manifest = model_folder.publish(work, out, "hf", {"name": "source"}, [{"name": "pass"}], fingerprint={"a": 1})
    assert not work.exists()
    assert read_manifest(out) == manifest
    assert manifest["outputs"] == hash_folder(out)
    assert manifest["fingerprint"] == {"a": 1}
    assert list(model_folder.weight_hashes(manifest)) == ["model.safetensors"]
