"""What decides a result is in the key of what is kept of it: each cache is missed when that changes."""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import build, write_text

import llmc
from llmc.compress import preparation, unfinished
from llmc.compress.quantize import budget
from llmc.compress.quantize import run as quantize_run
from llmc.compress.quantize.config import QuantizeConfig
from llmc.compress.skeleton import Skeleton
from llmc.compress.teaching.job import Job
from llmc.compress.text import Calibration
from llmc.errors import UserError
from llmc.files import write_sealed
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.manifest import MANIFEST
from llmc.runtimes.targets import kernels
from llmc.sources import dequantize

TEACHING = {"steps": 2, "batch": 1, "seq_len": 16, "held_out": 1, "sampled": 0, "threads": 1, "precision": "fp32"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama", tmp_path_factory.mktemp("base") / "m")


@pytest.fixture
def skeleton(base: Path) -> Skeleton:
    return Skeleton(Checkpoint.open(base), "cpu")


def begun(command: Callable[[], Any]) -> None:
    """Run a teaching command up to the moment when its unfinished folder is there."""
    def stop(self: Job) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Job, "texts", stop)
        with pytest.raises(KeyboardInterrupt):
            command()


@pytest.mark.parametrize("command", ["heal", "distill"])
def test_a_changed_text_is_not_resumed(command: str, base: Path, tmp_path: Path) -> None:
    text, out = write_text(tmp_path / "text.txt"), tmp_path / "out"
    if command == "heal":
        llmc.quantize(base, method="rtn", out=tmp_path / "small", threads=1)

    def teach(resume: bool) -> Any:
        if command == "heal":
            return llmc.heal(tmp_path / "small", base, calibration=text, out=out, resume=resume, **TEACHING)
        return llmc.distill(base, base, calibration=text, out=out, resume=resume, **TEACHING)

    begun(lambda: teach(False))
    before = text.read_text()
    text.write_text(before.replace("e", "a", 1))  # same name, same length
    with pytest.raises(UserError, match=r"cannot resume: .* differs in texts\n"):
        teach(True)
    text.write_text(before)
    assert teach(True)["out"] == str(out)


def test_sampled_text(base: Path, skeleton: Skeleton, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = itertools.count(1)
    monkeypatch.setattr(preparation, "load_torch_model", lambda *a: None)
    monkeypatch.setattr(preparation, "sample_from_model", lambda *a: torch.full((2, 16), next(count)))
    start = QuantizeConfig(calibration="self", samples=2, seq_len=16, resume=True)

    def sampled(files: dict[str, str] | None = None, threads: int = 1, **change: Any) -> int:
        config = dataclasses.replace(start, **change)
        found = preparation.calibration_text(skeleton, files or {"a": "1"}, config, threads, tmp_path / "kept.safetensors")
        return int(found.sequences[0, 0])

    assert sampled() == sampled() == 1
    changes = ({"resume": False}, {"files": {"a": "2"}}, {"threads": 2}, {"seed": 5}, {"samples": 3}, {"seq_len": 17})
    for number, change in enumerate(changes, 2):
        assert sampled(**change) == number, change  # type: ignore[arg-type]
    assert sampled() == 8
    monkeypatch.setattr(preparation, "digest", lambda *a: "other code")
    assert sampled() == 9
    monkeypatch.setattr(preparation, "version", lambda package: "0")
    assert sampled() == sampled() == 10


def test_sensitivities(base: Path, skeleton: Skeleton, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    count = itertools.count(1)
    monkeypatch.setattr(budget, "load_torch_model", lambda *a: torch.nn.Module())
    monkeypatch.setattr(budget, "measure", lambda *a: {"number": next(count)})
    monkeypatch.setattr(budget, "sample_from_model", lambda *a: None)
    text = write_text(tmp_path / "text.txt")

    def measured(files: dict[str, str], named: Any = frozenset(), **change: Any) -> Any:
        config = QuantizeConfig(target_bpw=4.5, calibration=change.pop("calibration", str(text)), **change)
        return budget._measured(config, skeleton, {"files": files}, {}, named)["number"]

    assert measured({"a": "1"}) == measured({"a": "1"}) == 1
    assert measured({"a": "2"}) == 2
    assert measured({"a": "1"}, calibration="self") == measured({"a": "1"}, calibration="self") == 3
    assert measured({"a": "1"}, calibration="self", seed=9) == 4
    text.write_text(text.read_text()[::-1])
    assert measured({"a": "1"}) == measured({"a": "1"}) == 5
    monkeypatch.setattr(torch, "__version__", "0")
    assert measured({"a": "1"}) == 6
    monkeypatch.setattr(budget.closure, "digest", lambda *a: "other code")
    assert measured({"a": "1"}) == 7
    assert measured({"a": "1"}, {"q4_0"}) == 7, "it is measured always"
    assert measured({"a": "1"}, {"q4_0", "iq3_s"}) == 8


def test_fingerprints_of_folders_and_of_a_part_of_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformed folders, layers and the teacher's tokens lie under one. --transform auto learns from a part of the text."""
    def made(numbers: Any = None, threads: int = 1, files: Any = None, text: str = "t", part: dict[str, int] | None = None,
             **more: Any) -> dict[str, Any]:
        calibration = Calibration(torch.zeros(1, 1), {"sha256": text, **(part or {})})
        return unfinished.fingerprint("llmc.errors", numbers or {"seed": 1}, threads, files or {"a": "1"}, calibration,
                                      **more)

    start = made()
    assert start == made()
    for change in ({"numbers": {"seed": 2}}, {"threads": 2}, {"files": {"a": "2"}}, {"text": "u"},
                   {"part": {"of_samples": 16}}, {"teacher": "x"}):
        assert made(**change) != start, change  # type: ignore[arg-type]
    for name in ("torch.__version__", "llmc.compress.unfinished.digest", "llmc.compress.unfinished.matmul_precision"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(name, "0" if name.startswith("torch") else lambda *a: "other")
            assert made() != start, name


def test_the_folder_that_waits_for_healing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, made = write_text(tmp_path / "text.txt"), []

    def run() -> dict[str, Any]:
        job.out.mkdir(exist_ok=True)
        made.append(text.read_text())
        return {}

    def heal(folder: Path, settings: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("llmc.compress.heal.run.heal", heal)
    config = QuantizeConfig(calibration=str(text), heal=2, out=tmp_path / "out", resume=True)
    job = SimpleNamespace(config=config, out=config.out, source=tmp_path, importance=None, threads=1,
                          described={"files": {"a": "1"}}, run=run, healing=lambda: None)
    for change, runs in (("", 1), ("", 1), ("a new text", 2), ("", 2)):
        job.out = config.out
        text.write_text(change or text.read_text())
        with pytest.raises(KeyboardInterrupt):
            quantize_run.quantize_and_heal(job)  # type: ignore[arg-type]
        assert len(made) == runs


def test_rates_of_kernels(tmp_path: Path) -> None:
    file = tmp_path / "rates.json"
    known = {**kernels._cached(None, 2), "attention": {}, "layer_seconds": [1, 2, 3]}
    write_sealed(file, known)
    assert kernels._cached(file, 2) == known
    assert kernels._cached(file, 3)["attention"] is None
    for key in ("cpu", "version", "code"):
        write_sealed(file, {**known, key: "other"})
        assert kernels._cached(file, 2)["attention"] is None


def test_dequantized_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "cache"))
    made: list[Path] = []

    def publish(work: Path, out: Path, *more: Any) -> None:
        out.mkdir(parents=True)
        (out / MANIFEST).write_text("{}")
        made.append(out)

    monkeypatch.setattr(dequantize, "_dequantize", lambda file, work: {})
    monkeypatch.setattr(dequantize, "publish", publish)
    monkeypatch.setattr(dequantize, "check_runnable", lambda file: None)
    monkeypatch.setattr(dequantize, "parts", lambda file: [file])
    file = tmp_path / "m.gguf"
    file.write_bytes(np.arange(9, dtype=np.uint8).tobytes())
    first = dequantize.dequantized_folder(file)
    assert dequantize.dequantized_folder(file) == first
    assert len(made) == 1
    monkeypatch.setattr(dequantize.closure, "digest", lambda *a: "other code")
    second = dequantize.dequantized_folder(file)
    file.write_bytes(b"another file")
    third = dequantize.dequantized_folder(file)
    assert made == [first, second, third]
    assert len({*made}) == 3
    for folder in made:  # that nobody used for a month
        os.utime(folder.parent, (0, time.time() - 30 * 24 * 3600))
    assert dequantize.dequantized_folder(file) == third
    assert all(m.exists() for m in made), "nothing was made, so nothing goes"
    monkeypatch.setattr(dequantize.closure, "digest", lambda *a: "newer code")
    os.utime(third.parent, (0, time.time() - 30 * 24 * 3600))
    fourth = dequantize.dequantized_folder(file)
    assert [m.exists() for m in (first, second, third, fourth)] == [True, True, False, True], "of this file only"
    monkeypatch.setattr(dequantize.closure, "digest", lambda *a: "newest code")
    dequantize.dequantized_folder(file)
    assert fourth.exists(), "another llmc used it within a week"
