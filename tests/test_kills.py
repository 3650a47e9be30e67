"""Commands that die before any of their file calls: what they left is found, and the next run leaves the same files.

Each line of commands.py that writes dies before one of its calls, as by SIGKILL or as by Ctrl-C. With LLMC_ALL_KILLS=1 it is
every call, in both ways.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import commands
import pytest
from commands import SMALL, TEXT, TRAIN, Line, line
from crash import Calls, Dead, States, counted, died, listing, number_of_calls, state_of, steady
from killing import contents

import llmc
from llmc import cli, files, temporary
from llmc.formats import manifest

# What the lines of all commands leave out.
MORE = (
    line(f"quantize base --transform scaling {TEXT} -o q"), line(f"quantize base --method rtn --transform auto {TEXT} -o q"),
    line(f"quantize base --method rtn --heal 2 {TEXT} -o q"), line(f"quantize base --target-bpw 6 {TEXT} -o q"),
    line(f"quantize base --samples 4 --seq-len 32 {SMALL} -o q"), line(f"quantize q.gguf --method rtn -o again {SMALL}"),
    line(f"prune base --method depth --drop 1 {TEXT} -o p"), line(f"prune base --method width --ffn 0.5 {TEXT} -o p"),
    line(f"transform base --scaling awq --rotate r2 {TEXT} -o t"), line(f"heal q {TRAIN} --scope block -o h"),
    line(f"distill base {TRAIN} --teacher-top-k 4 -o d"),
)
# A bench takes seconds, and what it writes does not depend on the artifact.
LINES = [i for i in (*commands.LINES, *MORE) if i.code == 0 and (i.words[0] != "bench" or "q.gguf" in i.words)]
ALL = bool(os.environ.get("LLMC_ALL_KILLS"))


class Kitchen:
    """A folder with what lines read. It is made by other lines when it is first needed."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder = folder
        commands.prepare(folder, base)

    def serve(self, wanted: Line, place: Path) -> None:
        """Make the folder `place` with what a line reads, and go there."""
        place.mkdir()
        for name in self._read_by(wanted):
            found = self.folder / name
            if not os.path.lexists(found):
                self._make(name)
            for path in (found, manifest.manifest_path(found)) if found.is_file() else (found,):
                if path.is_symlink():
                    (place / path.name).symlink_to(path.readlink())
                elif path.is_dir():
                    shutil.copytree(path, place / path.name)
                elif path.is_file():
                    shutil.copy2(path, place)
        os.chdir(place)
        os.environ["LLMC_CACHE"] = str(place / "cache")

    def _make(self, name: str) -> None:
        made_by = self._maker(name)
        work = self.folder / f"for {name}"
        self.serve(made_by, work)
        assert cli.run([*made_by.words]) == 0
        for path in work.iterdir():
            if path.name.startswith(name):
                path.rename(self.folder / path.name)

    def _maker(self, name: str) -> Line:
        return next(i for i in commands.LINES if name in i.outputs)

    def _read_by(self, wanted: Line) -> list[str]:
        known = {p.name for p in self.folder.iterdir()}.union(*(i.outputs for i in commands.LINES))
        texts = [(self.folder / w).read_text(encoding="utf-8") for w in wanted.words if w.endswith(".yaml") and w in known
                 and (self.folder / w).is_file()]
        words = {*wanted.words, *(word for text in texts for word in re.split(r"[\s,:\[\]]+", text))}
        return sorted(known & words - wanted.outputs)


@pytest.fixture(scope="module")
def kitchen(made: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Kitchen:
    return Kitchen(tmp_path_factory.mktemp("kitchen"), made.base)


def sample(count: int, wanted: int, seed: object = 0) -> list[int]:
    """Numbers of calls; at least half of them among the last quarter, where an artifact takes its place."""
    if ALL or count <= wanted:
        return list(range(1, count + 1))
    chance, late = random.Random(f"{count} {seed}"), count - count // 4
    return sorted({*chance.sample(range(1, late), wanted // 2), *chance.sample(range(late, count + 1), wanted - wanted // 2)})


def remains(folder: Path) -> set[str]:
    """What lies in a folder under a temporary name, but not what can be gone on with."""
    names = {name for name in listing(folder) if ".unfinished" not in name.partition("/")[0]}
    return {name for name in names if temporary.NAME.fullmatch(Path(name).name) or name.endswith(".lock")}


def ways(wanted: Line, calls: int) -> list[tuple[int, bool]]:
    """(the number of the call before which the line dies, whether as by SIGKILL)."""
    if ALL:
        return [(at, at_once) for at in range(1, calls + 1) for at_once in (True, False)]
    chance = random.Random(str(wanted))
    return [(sample(calls, 1, wanted)[0], chance.random() < 0.5)]


@pytest.mark.parametrize("wanted", LINES, ids=str)
def test_a_command(wanted: Line, kitchen: Kitchen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dead before a call, and run again: the files are those of a run that nothing stopped, and nothing else is there.

    What a kill leaves is what lies there before the call. So one run gives the states of all kills. An interrupt is caught
    and cleaned up after, so that each needs a run. A state that was there already is not gone on with a second time."""
    monkeypatch.setenv("LLMC_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("llmc.evals.quality.run.try_first", lambda artifact: None)  # another process, which writes nothing
    here, begun = tmp_path / "here", time.monotonic()
    states = States(here, tmp_path / "states")
    kitchen.serve(wanted, here)
    with counted(Calls(here, look=states.look)) as counter:
        assert cli.run([*wanted.words]) == wanted.code
    calls, whole = counter.count, steady(here)
    assert calls or not wanted.outputs
    resumes = any(p.name == "resume" for p in commands.every()[commands.command_of(wanted.words)].params)
    done: set[str] = set()
    for at, at_once in ways(wanted, calls) if calls else ():
        said = f"{'killed' if at_once else 'interrupted'} before call {at} of {calls}"
        os.chdir(tmp_path)
        shutil.rmtree(here)
        if at_once:
            shutil.copytree(states.kept / str(states.at[at]), here, symlinks=True)
            os.chdir(here)
        else:
            kitchen.serve(wanted, here)
            with counted(Calls(here, at, at_once=False)) as counter:
                assert cli.run([*wanted.words]) != 0 or wanted.code == 1, said
            assert counter.count >= at
            assert remains(here) == set(), said
        state = state_of(here)
        if state in done:
            continue
        more = ["--resume"] if resumes and len(done) % 2 else []
        done.add(state)
        go_on(wanted, here, whole, more, said)
    print(f"{wanted}: {calls} calls, {len(ways(wanted, calls)) if calls else 0} kills, {len(done)} states, "
          f"{time.monotonic() - begun:.0f} s")


def go_on(wanted: Line, here: Path, whole: dict[str, object], more: list[str], said: str) -> None:
    """Run the line after a run of it died. whole: what a run that nothing stopped leaves."""
    for out in (here / name for name in wanted.outputs):
        if out.exists() and manifest.read_manifest(out):
            assert llmc.verify(out)["problems"] == [], f"{said}: a wrong artifact"
    left = steady(here)
    done = all(left.get(name) == value for name, value in whole.items())  # `target rm` may find nothing to remove
    assert cli.run([*wanted.words, *more]) in ((wanted.code, 2) if done else (wanted.code,)), said
    assert steady(here) == whole, said


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
