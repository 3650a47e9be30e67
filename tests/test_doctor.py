"""`llmc doctor` tells what is here from what is not, and what to type."""

from __future__ import annotations

import json
from importlib import metadata

import pytest
import torch

from llmc.about import doctor
from llmc.cli import run


def test_this_environment(capsys: pytest.CaptureFixture[str]) -> None:
    report = doctor.examine()
    assert report["ok"]
    assert report["packages"]["core"]["torch"] == {"version": metadata.version("torch"), "problem": None}
    assert report["runtimes"]["torch"]["threads"] == torch.get_num_threads()
    assert report["runtimes"]["llama.cpp"]["build"], "the dev extra brings llama-cpp-python"
    assert report["disk"]["here"] > 0
    assert run(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["packages"] == report["packages"]


def test_a_missing_extra_and_its_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(doctor.PACKAGES, "gguf", {"llama-cpp-python": "llama_cpp", "no-such-package": "no_such_module"})
    assert run(["doctor"]) == 0, "an extra is no part of the core"
    page = capsys.readouterr().out
    assert "missing    no-such-package is not installed\n           next: pip install 'llmc-toolkit[gguf]'" in page
    assert "llama-cpp-python" in page


def test_installed_but_broken(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(doctor.PACKAGES, "onnx", {"numpy": "numpy.no_such_part"})
    (broken,) = [m for m in doctor.examine()["missing"] if m["install"].endswith("[onnx]'")]
    assert broken["why"].startswith(f"numpy {metadata.version('numpy')} does not load: ")


def test_a_broken_core_is_exit_code_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(doctor.PACKAGES, "core", {"no-such-package": "no_such_module"})
    assert run(["doctor"]) == 2
    assert "the core does not work" in capsys.readouterr().out
