"""Where a GGUF file comes from: its metadata, its licence, its manifest."""

from __future__ import annotations

from pathlib import Path

from gguf import GGUFReader
from gguf_files import export
from rounding import gptq_folder
from tiny import build

from llmc.about.verification import verify as verify_artifact
from llmc.files import write_json
from llmc.formats.gguf import field
from llmc.formats.manifest import manifest_path, new_manifest, read_manifest
from llmc.formats.types import IntegerType

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
