"""Damaged and odd files, as hypothesis draws them: a command that reads one ends with a result or with one clear error.

Each input is one file of tests/fuzzed.py, damaged as tests/damage.py says, and one command line that reads it. The command
runs in a process of its own (tests/forks.py). LLMC_FUZZ=2000 (`make fuzz`) tries so many inputs, otherwise it is a share of
them. The seeds are fixed.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import fuzzed
import pytest
from crash import listing
from damage import Damage, damages
from forks import MEMORY, End, Forks, Order
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from llmc import temporary

pytestmark = pytest.mark.skipif(not hasattr(os, "fork") or sys.platform != "linux", reason="it forks, and reads /proc")

SHARE = 1  # inputs of each file, unless LLMC_FUZZ says more
ERROR = re.compile(r"[\w.]*(Error|Exception|Warning|Interrupt)\b")
PLACE = re.compile(r'File ".*/(llmc|compress|export|runtimes|evals)/(.*)", line (\d+)')
NOTES = ".llmc"  # what only helps a later run; every command may write there


@dataclass(frozen=True)
class Tried:
    """An input, and what is wrong with how it ended: '' if nothing is."""

    file: fuzzed.File
    damage: Damage
    command: str
    end: End
    fault: str

    def __str__(self) -> str:
        return f"{self.fault}\n    {self.file.path}: {self.damage.said}\n    llmc {self.command}"


def fault_of(end: End, output: str, new: set[str], gates: bool = False) -> str:
    """What is wrong with the end of a command; '' if nothing is. new: the files that it made and did not remove."""
    if end.late:
        return "hang: it did not end"
    if end.signal:
        return f"native: it died of signal {end.signal}"
    if "Traceback (most recent call last)" in output or end.code == 70:
        places = PLACE.findall(output)
        where = "{}/{}:{}".format(*places[-1]) if places else "nowhere in llmc"
        error = next((line for line in reversed(output.splitlines()) if ERROR.match(line)), "")
        return f"traceback: {where}: {error[:120]}"
    if end.code not in ((0, 1, 2) if gates else (0, 2)):
        return f"exit: code {end.code}"
    if end.memory > MEMORY or "out of memory" in output:
        return f"memory: {end.memory >> 20:,} MB"
    if end.code == 2 and "error: " not in output and "problems: " not in output and "Usage: " not in output:
        return "silent: no error is told"
    left = sorted(n for n in new if end.code == 2 or any(part.startswith(".") for part in n.split("/")))
    return f"leftover: {', '.join(left[:3])}" if left else ""


def made_by(old: set[str], now: set[str]) -> set[str]:
    """The files that a command made. What it puts into a folder of unfinished work that was there before may stay there."""
    unfinished = tuple(f"{n}/" for n in old if n.startswith(".out.") or n == "run")
    return {n for n in now - old if not n.startswith((NOTES, *unfinished)) or temporary.NAME.fullmatch(n.rpartition("/")[2])}


@pytest.fixture(scope="module")
def world(made: SimpleNamespace, exported: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = Path.cwd()
    try:
        return fuzzed.world(tmp_path_factory.mktemp("fuzz") / "world", made, exported.out)
    finally:
        os.chdir(here)


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    started = Forks()
    yield started
    started.close()


@pytest.fixture(scope="module")
def tally(request: pytest.FixtureRequest) -> Iterator[list[Tried]]:
    """All inputs; at the end their number and the faults by kind are printed."""
    tried: list[Tried] = []
    since = time.monotonic()
    yield tried
    if "LLMC_FUZZ" in os.environ:
        kinds = Counter(t.fault.partition(":")[0] for t in tried if t.fault)
        said = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common()) or "no faults"
        codes = Counter("refused" if t.end.code == 2 else "done" for t in tried if not t.fault)
        seconds, memory = time.monotonic() - since, max(t.end.memory for t in tried) >> 20
        slowest = max(t.end.seconds for t in tried)
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\n{len(tried):,} inputs over {len(fuzzed.FILES)} files in {seconds:,.0f} s: {said}; "
                  f"{codes['refused']} were refused, {codes['done']} done; peak {memory:,} MB, slowest {slowest:.1f} s")


def inputs(file: fuzzed.File, good: bytes, count: int) -> list[tuple[Damage, str]]:
    """`count` damages of a file, each with a command that reads it; the same ones each time."""
    found: list[tuple[Damage, str]] = []

    @seed(zlib.crc32(file.path.encode()))
    @settings(max_examples=count + 1, database=None, deadline=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))
    @given(damages(file.form, good), st.sampled_from(file.commands))
    def draw(damage: Damage, command: str) -> None:
        found.append((damage, command))

    draw()
    return found[-count:]  # the first one that hypothesis draws is the simplest of all


def lay_out(file: fuzzed.File, world: Path, folder: Path) -> None:
    """The working folder of a command, with the good file."""
    folder.mkdir()
    for thing in file.things:
        name, _, other = thing.partition(":")
        if (world / name).is_dir():
            shutil.copytree(world / name, folder / (other or name), symlinks=True)
        else:
            shutil.copy(world / name, folder / (other or name))


def tried(file: fuzzed.File, world: Path, forks: Forks, folder: Path, count: int) -> list[Tried]:
    """Damage the file and run the commands."""
    lay_out(file, world, folder / "good")
    place = next((folder / "good").glob(file.path), folder / "good" / file.path)
    if file.good is None:
        assert place.is_file(), f"there is no {file.path} in the world"
    path, good = place.relative_to(folder / "good"), file.good if file.good is not None else place.read_bytes()
    drawn = inputs(file, good, count)
    before, orders = [], []
    for number, (damage, command) in enumerate(drawn):
        here = folder / str(number)
        lay_out(file, world, here)
        damage.apply(here / path)
        before.append(listing(here) | {path.as_posix()})
        orders.append(Order(str(here), tuple(shlex.split(command))))
    ends = forks.run(orders)
    found = []
    for (damage, command), end, order, old in zip(drawn, ends, orders, before, strict=True):
        output = Path(f"{order.folder}.out").read_text(encoding="utf-8", errors="replace")
        fault = fault_of(end, output, made_by(old, listing(Path(order.folder))), file.gates)
        found.append(Tried(file, damage, command, end, fault))
        shutil.rmtree(order.folder)
    return found


@pytest.mark.parametrize("file", fuzzed.FILES, ids=lambda f: f.path)
def test_a_damaged_file(file: fuzzed.File, world: Path, forks: Forks, tally: list[Tried], tmp_path: Path) -> None:
    wanted = int(os.environ.get("LLMC_FUZZ", 0))
    found = tried(file, world, forks, tmp_path, -(-wanted // len(fuzzed.FILES)) or SHARE)
    tally += found
    bad = [str(t) for t in found if t.fault]
    assert not bad, f"{len(bad)} of {len(found)} inputs end badly\n  " + "\n  ".join(bad)


@pytest.mark.parametrize(("call", "fault"), [("die", "native: it died of signal 6"), ("wait", "hang"), ("hold", "memory: 2,"),
                                             ("forget", "traceback")])
def test_a_bad_end_is_seen(call: str, fault: str, forks: Forks, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    end = forks.run([Order(str(tmp_path / "x"), (), f"forks:{call}", 3 if call == "wait" else 60)])[0]
    assert fault_of(end, (tmp_path / "x.out").read_text(), set()).startswith(fault)


def test_other_bad_ends(tmp_path: Path) -> None:
    refused, done = (End(code, 0, 1 << 20, 0.1, False) for code in (2, 0))
    assert fault_of(refused, "error: no", set()) == fault_of(done, "", {"out"}) == ""
    assert fault_of(refused, "", set()).startswith("silent")
    assert fault_of(refused, "error: no", {"out"}) == "leftover: out"
    assert fault_of(done, "", made_by({"m"}, {"m", ".out.unfinished"})) == "leftover: .out.unfinished"
    assert fault_of(End(1, 0, 1, 0.1, False), "", set()) == "exit: code 1"
    assert fault_of(End(1, 0, 1, 0.1, False), "", set(), gates=True) == ""


@pytest.mark.parametrize("form", ["JSON", "TOML", "YAML_FORM", "CSV", "LINES", "SAFETENSORS", "GGUF", "ONNX"])
def test_a_file_that_nothing_damaged_is_written_as_it_was(form: str, world: Path) -> None:
    """Otherwise every input would be refused for another reason than its damage."""
    import damage

    names = {"JSON": "m/config.json", "TOML": "targets.toml", "YAML_FORM": "gates.yaml", "LINES": "chat.jsonl",
             "SAFETENSORS": "q/model.safetensors", "GGUF": "q.gguf", "ONNX": "o/model.onnx"}
    good = (world / names[form]).read_bytes() if form in names else fuzzed.SHEET.encode()
    f = getattr(damage, form)
    again = f.dump(f.load(good))
    trees = [f.load(again), f.load(good)]
    for tree in trees if form == "SAFETENSORS" else ():
        del tree["length"]  # of the header, which may have spaces
    assert trees[0] == trees[1]
    if form in ("SAFETENSORS", "GGUF"):
        assert again[-1000:] == good[-1000:]
