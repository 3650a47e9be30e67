"""Commands that die before any of their file calls: what they left is found, and the next run writes the same bytes.

Each command dies before a sample of its calls, once as by SIGKILL and once as by Ctrl-C. With
LLMC_ALL_KILLS=1 it is every call.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from crash import Calls, Dead, counted, died, listing, number_of_calls
from killing import contents

import llmc
from llmc import files, temporary
from llmc.formats import manifest

SETTINGS: dict[str, Any] = {"samples": 8, "seq_len": 32, "threads": 2}


def sample(count: int, wanted: int, seed: object = 0) -> list[int]:
    """Numbers of calls; at least half of them among the last quarter, where an artifact takes its place."""
    if os.environ.get("LLMC_ALL_KILLS") or count <= wanted:
        return list(range(1, count + 1))
    chance, late = random.Random(f"{count} {seed}"), count - count // 4
    return sorted({*chance.sample(range(1, late), wanted // 2), *chance.sample(range(late, count + 1), wanted - wanted // 2)})


def remains(folder: Path) -> set[str]:
    """What lies beside an output under a temporary name."""
    return {name for name in listing(folder) if temporary.NAME.fullmatch(Path(name).name)}


def survives(make: Callable[[Path], Any], again: Callable[[Path], Any], folder: Path, wanted: int = 1,
             name: str = "out") -> None:
    """`make` the artifact it is given; die in it; `again` must give the same bytes and leave nothing else."""
    def made(place: str) -> Path:
        (folder / place).mkdir()
        os.chdir(folder / place)
        return folder / place / name

    whole = made("whole")
    calls = number_of_calls(lambda: make(whole), folder / "whole")
    assert calls > 2
    for at_once in (True, False):
        for at in sample(calls, wanted, at_once):
            place = f"{'killed' if at_once else 'interrupted'}-{at}"
            out = made(place)
            died(lambda out=out: make(out), folder / place, at, at_once)  # type: ignore[misc]
            if not at_once:
                left = {n for n in remains(out.parent) if ".unfinished" not in n.partition("/")[0]}
                assert left == set(), f"interrupted before call {at}"
            if out.exists() and manifest.read_manifest(out):
                assert llmc.verify(out)["problems"] == [], f"{place}: a wrong artifact"
            again(out)
            assert contents(out) == contents(whole), place
            assert listing(out.parent) == listing(whole.parent), place


@pytest.fixture(params=["killed", "interrupted"])
def at_once(request: pytest.FixtureRequest) -> bool:
    return request.param == "killed"


def test_a_file_is_the_old_or_the_new_one(tmp_path: Path, at_once: bool) -> None:
    place = tmp_path / "report.json"
    files.write_json(place, {"old": 1})
    for at in range(1, 1 + number_of_calls(lambda: files.write_json(place, {"old": 1}), tmp_path)):
        assert died(lambda: files.write_json(place, {"new": 2}), tmp_path, at, at_once)
        assert files.read_json(place) in ({"old": 1}, {"new": 2})
        files.write_json(place, {"old": 1})
        assert listing(tmp_path) == {"report.json"}


def test_a_folder_is_the_old_or_the_new_one(tmp_path: Path, at_once: bool) -> None:
    """Killed between its two renames, the folder has no name: whoever looks for it finds the old one again."""
    def publish(text: str) -> None:
        with files.staged_folder(tmp_path / "small") as work:
            (work / "llmc.json").write_text("{}")
            (work / "weights").write_text(text)

    publish("old")
    nameless = 0
    for at in range(1, 1 + number_of_calls(lambda: publish("old"), tmp_path)):
        assert died(lambda: publish("new"), tmp_path, at, at_once)
        nameless += not (tmp_path / "small").exists()
        temporary.restore(tmp_path / "small")
        assert (tmp_path / "small/weights").read_text() in ("old", "new")
        publish("old")
        assert listing(tmp_path) == {"small", "small/llmc.json", "small/weights"}
    assert nameless == at_once


def test_a_file_never_has_the_manifest_of_another(tmp_path: Path, at_once: bool) -> None:
    out = tmp_path / "small.gguf"

    def write(text: str) -> None:
        with manifest.staged_artifact(out) as (tmp, said):
            tmp.write_text(text)
            said.update(manifest.new_manifest("gguf", {}, []))

    def vouched() -> bool:
        return {out.name: files.sha256(out)} == (manifest.read_manifest(out) or {}).get("outputs")

    for first in (True, False):
        calls = number_of_calls(lambda: write("old"), tmp_path)
        for at in range(1, calls + 1):
            for path in (out, manifest.manifest_path(out)) if first else ():
                path.unlink(missing_ok=True)
            assert died(lambda: write("new"), tmp_path, at, at_once)
            if out.exists() and vouched():
                assert out.read_text() in ("old", "new")
            if first and not at_once:
                assert listing(tmp_path) in (set(), {"small.gguf", "small.gguf.llmc.json"}), at
            manifest.check_output(out, "gguf")  # it may be written again
            write("old")
            assert vouched()
            assert listing(tmp_path) == {"small.gguf", "small.gguf.llmc.json"}


def test_removing_is_idempotent(tmp_path: Path) -> None:
    """A folder whose removal was cut short does not say that it can be gone on with."""
    def fill() -> Path:
        folder = tmp_path / ".small.unfinished"
        (folder / "layers").mkdir(parents=True, exist_ok=True)
        for name in ("fingerprint.json", "state.json", "layers/0001.json"):
            (folder / name).write_text("{}")
        return folder

    fill()
    for at in range(2, 1 + number_of_calls(lambda: temporary.remove(tmp_path / ".small.unfinished"), tmp_path)):
        folder = fill()
        assert died(lambda folder=folder: temporary.remove(folder), tmp_path, at, True)  # type: ignore[misc]
        assert not (folder / "fingerprint.json").exists()
        temporary.remove(folder)
        assert listing(tmp_path) == set()


def test_quantize_without_data(tmp_path: Path, made: SimpleNamespace) -> None:
    survives(lambda out: llmc.quantize(made.base, method="rtn", out=out, threads=2),
             lambda out: llmc.quantize(made.base, method="rtn", out=out, threads=2, resume=True), tmp_path, 4)


def test_quantize_without_resuming(tmp_path: Path, made: SimpleNamespace) -> None:
    make = lambda out: llmc.quantize(made.base, method="rtn", out=out, threads=2)  # noqa: E731
    survives(make, make, tmp_path)


@pytest.mark.parametrize(("command", "options"), [
    ("quantize", {"method": "gptq"}), ("quantize", {"method": "gptq", "transform": "scaling"}),
    ("prune", {"method": "wanda", "sparsity": 0.5}), ("transform", {"scaling": "awq"}), ("imatrix", {}),
], ids=["quantize", "quantize-transform", "prune", "transform", "imatrix"])
def test_commands_with_text(tmp_path: Path, made: SimpleNamespace, text: Path, command: str, options: dict[str, Any]) -> None:
    run = getattr(llmc, command)
    given = {"calibration": str(text), **SETTINGS, **options}
    survives(lambda out: run(made.base, out=out, **given),
             lambda out: run(made.base, out=out, resume=True, **given), tmp_path,
             name="out.gguf" if command == "imatrix" else "out")


@pytest.mark.parametrize("command", ["heal", "distill"])
def test_teaching(tmp_path: Path, rounded: tuple[Path, Path, Path], command: str) -> None:
    base, small, text = rounded
    run, given = getattr(llmc, command), {"calibration": str(text), "steps": 4, "seq_len": 32, "threads": 2, "held_out": 4}
    student = small if command == "heal" else base
    survives(lambda out: run(student, base, out=out, **given),
             lambda out: run(student, base, out=out, resume=True, **given), tmp_path)


def test_quantize_and_heal(tmp_path: Path, made: SimpleNamespace, text: Path) -> None:
    given = {"method": "rtn", "heal": 4, "calibration": str(text), "seq_len": 32, "threads": 2}
    survives(lambda out: llmc.quantize(made.base, out=out, **given),
             lambda out: llmc.quantize(made.base, out=out, resume=True, **given), tmp_path)


@pytest.mark.parametrize("format", ["gguf", "onnx"])
def test_export(tmp_path: Path, made: SimpleNamespace, format: str) -> None:
    def make(out: Path) -> None:
        fixed = {"accuracy_level": "4"} if format == "onnx" else {}  # the default is measured: it follows the clock
        llmc.export(made.gptq, format=format, out=out, threads=2, **fixed)

    survives(make, make, tmp_path, 2, "out.gguf" if format == "gguf" else "out")


def test_an_older_artifact_is_there_whenever_its_replacement_dies(tmp_path: Path, made: SimpleNamespace) -> None:
    out = tmp_path / "small"

    def make(bits: int) -> None:
        llmc.quantize(made.base, method="rtn", bits=bits, out=out, threads=2)

    make(8)
    old = contents(out)
    calls = number_of_calls(lambda: make(8), tmp_path)
    make(4)
    new = contents(out)
    for at in sample(calls, 4):
        make(8)
        with contextlib.suppress(Dead), counted(Calls(tmp_path, at)):
            make(4)
        assert llmc.verify(out)["problems"] == []
        assert contents(out) in (old, new)


def test_a_run_of_a_recipe(tmp_path: Path, made: SimpleNamespace) -> None:
    recipe = tmp_path / "chain.yaml"
    recipe.write_text(f"model: {made.base}\ndefaults: {{threads: 2}}\nsteps: [quantize: {{method: rtn}}, export]\n",
                      encoding="utf-8")

    def make(out: Path) -> Any:
        return llmc.run_recipe(recipe, out=out)

    def figures(out: Path) -> dict[str, Any]:
        return {p.relative_to(out).as_posix(): contents(p) for p in out.rglob("*.gguf")}

    os.chdir(tmp_path)
    calls = number_of_calls(lambda: make(tmp_path / "whole"), tmp_path)
    for at in sample(calls, 3):
        out = tmp_path / f"killed-{at}"
        died(lambda out=out: make(out), tmp_path, at, True)  # type: ignore[misc]
        make(out)
        assert figures(out) == figures(tmp_path / "whole")
        assert remains(out) == set()
        assert listing(out) == listing(tmp_path / "whole")
