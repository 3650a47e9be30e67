"""`llmc models`: the table says what the rows, the proofs and llama.cpp's converter say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmc import cli
from llmc.about import models
from llmc.export.onnx.builder import known
from llmc.families import FAMILIES


def run(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = cli.run(["models", *argv])
    found = capsys.readouterr()
    return code, found.out, found.err


def test_every_family_is_there_and_says_what_its_row_says(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(["--json"], capsys)
    assert code == 0
    rows: dict[str, Any] = {row["family"]: row for row in json.loads(out)["families"]}
    assert set(rows) == set(FAMILIES)
    for name, row in rows.items():
        family = FAMILIES[name]
        assert (row["gguf"]["own"] == "no") == (not family.gguf.name)
        assert (row["onnx"] == "no") == (family.architecture not in known())
        assert (row["prune"]["width"] == "no") == bool(family.unnarrowable)
        assert (row["transform"] == "no") == bool(family.unmapped)
        assert row["gguf"]["converter"] in (None, True, False)  # None: the converter is not set up
    assert rows["gemma2"]["rotation"] == "r2"
    assert rows["cohere"]["why_not"]["width"].startswith("its LayerNorm")


def test_what_is_not_proved_is_untested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "proved.json"
    path.write_text(json.dumps({"packages": {"torch": "9.9"}, "families": {"llama": {"gguf": {"kld": 1e-6}}}}))
    monkeypatch.setattr(models, "PROOFS", path)
    _, out, _ = run([], capsys)
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line}
    assert lines["llama"] == ["untested", "untested", "untested", "yes", "untested"]
    assert lines["qwen2"] == ["untested", "untested", "untested", "untested", "untested"]
    assert lines["opt"][-2:] == ["-", "-"]
    assert "torch 9.9" in out


def test_the_converter_is_read_and_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "conversion").mkdir()
    code = tmp_path / "conversion" / "__init__.py"
    code.write_text('TEXT_MODEL_MAP: dict[str, str] = {"OPTForCausalLM": "opt"}\nraise SystemExit("run")\n')
    _, out, _ = run(["--converter", str(tmp_path), "--json"], capsys)
    rows = {row["family"]: row for row in json.loads(out)["families"]}
    assert rows["opt"]["gguf"] == {"own": "no", "converter": True}
    assert rows["llama"]["gguf"]["converter"] is False
    _, out, _ = run(["--converter", str(tmp_path)], capsys)
    assert next(line for line in out.splitlines() if line.startswith("opt ")).split()[-2:] == ["converter", "-"]
    for spoiled in ("TEXT_MODEL_MAP =", "x = 1"):
        code.write_text(spoiled)
        exit_code, _, err = run(["--converter", str(tmp_path)], capsys)
        assert exit_code == 2
        assert "conversion/__init__.py" in err
