"""`llmc inspect` against what is known of the tiny models."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from safetensors.torch import load_file

import llmc
from llmc.cli import run
from llmc.errors import UserError

DECODER = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)  # q, o; k, v; gate, up, down of two layers
EMBEDDING = 512 * 64
NORMS = 5 * 64


def test_float_folder(made: SimpleNamespace) -> None:
    report = llmc.inspect(made.base)
    assert report["architecture"] == "LlamaForCausalLM"
    assert report["model"] == {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "context": 256}
    assert report["type"] is None
    assert report["licence"] == "mit"
    assert report["provenance"] is None
    w = report["weights"]
    assert w["parameters"] == DECODER + EMBEDDING + NORMS
    assert w["bits_per_weight"] == w["decoder_bits_per_weight"] == 16
    digest = hashlib.sha256((made.base / "tokenizer.json").read_bytes()).hexdigest()
    assert report["tokenizer"]["files"]["tokenizer.json"] == digest


def test_gptq_folder(made: SimpleNamespace) -> None:
    report = llmc.inspect(made.gptq)
    assert report["type"] == "int4-sym-g32"
    assert report["format"] == "Hugging Face folder, gptq"
    assert report["licence"] == "mit"
    assert report["provenance"]["source"]["name"] == "base"
    assert [p["config"]["method"] for p in report["provenance"]["passes"]] == ["rtn"]
    assert "outputs" not in report["provenance"]
    assert report["weights"]["parameters"] == DECODER + EMBEDDING + NORMS
    stored = sum(t.nbytes for t in load_file(made.gptq / "model.safetensors").values())
    assert report["weights"]["tensor_bytes"] == stored


def test_gguf(made: SimpleNamespace) -> None:
    report = llmc.inspect(made.gguf)
    assert report["architecture"] == "llama"
    assert report["model"] == {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "context": 256}
    assert report["type"] == "Q4_0"
    assert report["weights"]["decoder_bits_per_weight"] == 4.5
    assert report["weights"]["file_bytes"] == made.gguf.stat().st_size
    assert report["tokenizer"]["vocabulary"] == 512
    assert report["tokenizer"]["eos"] == [1]
    assert report["licence"] == "mit"


def test_tensors_add_up(made: SimpleNamespace) -> None:
    for artifact in (made.base, made.gptq, made.gguf):
        report = llmc.inspect(artifact, tensors=True)
        assert sum(t["nbytes"] for t in report["tensors"]) == report["weights"]["tensor_bytes"]
        assert sum(t["parameters"] for t in report["tensors"]) == report["weights"]["parameters"]
        assert sum(c["bytes"] for c in report["weights"]["classes"].values()) == report["weights"]["tensor_bytes"]


@pytest.mark.parametrize("form", ["file", "config", "named"])
def test_chat_template_hash_is_of_the_template_itself(made: SimpleNamespace, tmp_path: Path, form: str) -> None:
    folder = tiny.build("llama", tmp_path / "m")
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    if form == "file":
        (folder / "chat_template.jinja").write_text(template)
    else:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config["chat_template"] = template if form == "config" else [{"name": "default", "template": template}]
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    found = llmc.inspect(folder)["tokenizer"]["chat_template_sha256"]
    assert found == hashlib.sha256(template.encode()).hexdigest()


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_every_family(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.build(family, tmp_path / family)
    report = llmc.inspect(folder)
    assert None not in (report["model"]["layers"], report["model"]["hidden"], report["model"]["heads"])
    classes = report["weights"]["classes"]
    assert min(classes[c]["parameters"] for c in ("embedding", "attention", "mlp")) > 0
    assert run(["inspect", str(folder)]) == 0
    assert f"{report['weights']['parameters'] / 1e6:.1f} M" in capsys.readouterr().out


def test_page_and_json(made: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(made.gguf), "--tensors"]) == 0
    page = capsys.readouterr().out
    for word in ("Q4_0", "4.50 in the decoder", "mit", "rtn", "token_embd.weight"):
        assert word in page
    assert run(["inspect", str(made.gptq), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == llmc.inspect(str(made.gptq))


def test_neither(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    for path in (tmp_path / "notes.txt", tmp_path / "nothing"):
        with pytest.raises(UserError, match="neither a model folder nor a"):
            llmc.inspect(path)
