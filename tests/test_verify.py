"""`llmc verify` finds every way in which an artifact is no longer what its manifest says, and nothing in a good one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from tiny import change_tensors

import llmc
from llmc.cli import run
from llmc.errors import UserError
from llmc.formats.manifest import MANIFEST, hash_folder, manifest_path


@pytest.fixture
def folder(made: SimpleNamespace, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.gptq, tmp_path / "small"))


@pytest.fixture
def file(made: SimpleNamespace, tmp_path: Path) -> Path:
    shutil.copy(manifest_path(made.gguf), tmp_path)
    return Path(shutil.copy(made.gguf, tmp_path))


def problems(artifact: Path) -> list[str]:
    return list(llmc.verify(artifact)["problems"])


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def test_good_artifacts_have_no_problems(made: SimpleNamespace) -> None:
    for artifact, kind in ((made.gptq, "gptq"), (made.gguf, "gguf")):
        report = llmc.verify(artifact)
        assert report["problems"] == []
        assert report["kind"] == kind
    assert llmc.verify(made.gptq)["files"] == len(hash_folder(made.gptq))


def test_one_flipped_bit_anywhere(folder: Path, file: Path) -> None:
    weights = folder / "model.safetensors"
    flip(weights, weights.stat().st_size // 2)
    flip(folder / "tokenizer.json", 100)
    found = problems(folder)
    assert [p for p in found if p.startswith("model.safetensors has changed")]
    assert [p for p in found if p.startswith("tokenizer.json has changed")]
    flip(file, file.stat().st_size - 1)
    assert [p for p in problems(file) if "small.gguf has changed" in p]


def test_missing_and_added_files(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "run_me.py").write_text("print('hello')")
    found = problems(folder)
    assert "tokenizer.json is missing" in found
    assert any(p.startswith("run_me.py is not in llmc.json") for p in found)


def test_a_renamed_file_is_still_itself(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "phone.gguf"
    manifest_path(file).rename(manifest_path(other))
    file.rename(other)
    assert problems(other) == []


def test_without_manifest(made: SimpleNamespace, folder: Path) -> None:
    (folder / MANIFEST).unlink()
    assert problems(folder) == [f"there is no {folder / MANIFEST}: llmc did not make this, or its manifest was lost"]
    assert len(problems(made.base)) == 1
    (folder / MANIFEST).write_text("{")
    assert any("not valid JSON" in p for p in problems(folder))


def test_truncated_gguf(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-4000])
    assert any("not a complete GGUF file" in p for p in problems(file))


def test_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no artifact"):
        llmc.verify(tmp_path / "nothing")


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda f: edit_json(f / "quantize_config.json", bits=8), "quantize_config.json says bits = 8"),
        (lambda f: edit_json(f / "quantize_config.json", extra=1), "quantize_config.json says extra = 1"),
        (lambda f: (f / "quantize_config.json").unlink(), "quantize_config.json is missing"),
        (lambda f: change_tensors(f, lambda t: t[f"{Q}.qzeros"].add_(0x11111111)), f"{Q} of "),
        (lambda f: change_tensors(f, lambda t: t[f"{Q}.g_idx"].copy_(t[f"{Q}.g_idx"].flip(0))), f"{Q} of "),
        (lambda f: change_tensors(f, lambda t: t.pop(f"{Q}.scales")), f"{Q}.scales is missing"),
        (lambda f: change_tensors(f, lambda t: t[f"{Q}.scales"].fill_(float("nan"))), f"{Q}.scales in "),
        (lambda f: change_tensors(f, lambda t: t["model.norm.weight"].fill_(float("inf"))), "model.norm.weight in "),
    ],
)
def test_labels_and_values_are_held_against_each_other(
    folder: Path, damage: Callable[[Path], object], complaint: str
) -> None:
    """The manifest is made to agree with the damage: the structure alone must give it away."""
    damage(folder)
    edit_json(folder / MANIFEST, outputs=hash_folder(folder))
    found = problems(folder)
    assert any(p.startswith(complaint) for p in found), found


def test_wrong_version_label(folder: Path) -> None:
    for name in ("config.json", "quantize_config.json"):
        c = json.loads((folder / name).read_text())
        (c.get("quantization_config") or c).update(checkpoint_format="gptq_v2", format="gptq_v2")
        (folder / name).write_text(json.dumps(c))
    edit_json(folder / MANIFEST, outputs=hash_folder(folder))
    found = problems(folder)
    assert len(found) == 14  # each quantized linear of two layers
    assert all("is labelled sym, v2, but its zero points are 7…7, not 8" in p for p in found)


def test_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(folder)]) == 0
    assert "every file is unchanged" in capsys.readouterr().out
    (folder / "tokenizer.json").unlink()
    assert run(["verify", str(folder)]) == 2
    assert "tokenizer.json is missing" in capsys.readouterr().out
    assert run(["verify", str(folder), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["problems"] == ["tokenizer.json is missing"]


def test_reading_only(made: SimpleNamespace) -> None:
    before = {p: p.stat().st_mtime_ns for p in made.gptq.rglob("*")}
    llmc.verify(made.gptq)
    assert {p: p.stat().st_mtime_ns for p in made.gptq.rglob("*")} == before


def test_every_family_of_float_folders_reads(tmp_path: Path) -> None:
    model = tiny.build("gpt2", tmp_path / "gpt2")
    assert len(problems(model)) == 1  # no manifest; the tensors are fine
