"""Artifacts by targets: fronts, estimates beside measurements, emulated speeds out of every comparison, Markdown and page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from reports import speed, whole, write

from llmc.cli import run
from llmc.evals.compare.config import CompareConfig
from llmc.evals.compare.run import compare
from llmc.evals.pages.compare import page
from llmc.evals.report.store import hash_artifact
from llmc.runtimes.targets.kernels import write_layers


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """base and three candidates on local-cpu and on an emulated device; small.gguf is a real file."""
    reports = [whole("base", 1000_000, 1, 0.0, 10.0), whole("small.gguf", 1, 5, 0.2, 30.0),
               whole("worse", 300_000, 7, 0.4, 20.0), whole("fast", 200_000, 9, 0.4, 40.0)]
    write_layers(tmp_path / "small.gguf", "Q4_0", 2, 128, 256)
    reports[1]["artifact"] |= {"path": str(tmp_path / "small.gguf"), "sha256": hash_artifact(tmp_path / "small.gguf")}
    for r in reports:
        r["speeds"]["arm"] = speed(1000.0, "emulated-arm64")
    return write(tmp_path, *reports)


def cells(result: dict[str, Any], target: str) -> dict[str, dict[str, Any]]:
    return {c["artifact"]: c for c in result["matrix"] if c["target"] == target}


def test_the_front_of_a_device(paths: list[Path]) -> None:
    result = compare(CompareConfig(tuple(paths)))
    here = cells(result, "local-cpu")
    assert [n for n, c in here.items() if c["front"]] == ["base", "small.gguf", "fast"]
    assert here["base"]["memory"]["weights"] == 1000_000
    assert sum(here["base"]["memory"].values()) == 10**8  # the measured peak
    assert here["small.gguf"]["first_token"][0]["tokens"] == 512


def test_emulated_speeds_stand_in_no_front(paths: list[Path]) -> None:
    result = compare(CompareConfig(tuple(paths)))
    assert {c["source"] for c in cells(result, "arm").values()} == {"emulated"}
    assert not any(c["front"] for c in cells(result, "arm").values())
    text = page(result)
    assert "Emulated: its speed says nothing of the device." in text


def test_estimates_are_made_where_asked_and_where_the_file_is_there(paths: list[Path]) -> None:
    result = compare(CompareConfig(tuple(paths), target=("pi5", "local-cpu")))
    assert list(cells(result, "pi5")) == ["small.gguf"]
    guess = cells(result, "pi5")["small.gguf"]
    assert guess["source"] == "estimate"
    assert guess["decode"]["low"] < guess["decode"]["mid"] < guess["decode"]["high"]
    seconds = [p["mid"] for p in guess["first_token"]]
    assert seconds == sorted(seconds)
    assert {c["source"] for c in cells(result, "local-cpu").values()} == {"measured"}
    text = page(result)
    assert "Speed on pi5 against divergence" in text
    assert "published measurements" in text


def test_the_command_writes_markdown_for_a_pull_request(paths: list[Path], tmp_path: Path,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    out, html = tmp_path / "pr.md", tmp_path / "p.html"
    args = ["compare", *map(str, paths), "--markdown", str(out), "--page", str(html), "--target", "pi5"]
    assert run([*args, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {c["target"] for c in result["matrix"]} == {"local-cpu", "arm", "pi5"}
    text = out.read_text()
    assert "### Devices" in text
    assert "30.0 ★" in text
    assert "1000.0 emulated" in text
    assert "~" in text
    assert run(["compare", *map(str, paths), "--markdown", "-", "--page", str(html)]) == 0
    assert "### Devices" in capsys.readouterr().out
    assert run([*args[:-1], "pi9"]) == 2
