"""No command looks up a host or writes a device id unless it is asked for, native code included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import commands
import pytest
import watched
from commands import Line

from llmc.errors import UserError
from llmc.sources.data_sets import datasets_library
from llmc.sources.resolve import locate, resolve_model

# loaded by every Python of the test: look-ups and connections in Python are written down and refused
RECORDER = """
import os, socket

def note(what):
    with open(os.environ["LLMC_TEST_LOG"], "a") as f:
        f.write(str(what) + "\\n")
    raise OSError(f"no network in this test: {what}")

def lookup(host, *args, before=socket.getaddrinfo, **more):
    return before(host, *args, **more) if host in (None, "localhost", "127.0.0.1", "::1") else note(host)

class Socket(socket.socket):
    def connect(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1"):
            note(address)
        return super().connect(address)

if os.environ.get("LLMC_TEST_PYTHON", "1") == "1":
    socket.getaddrinfo, socket.socket = lookup, Socket
"""
# Asked for by nothing in them: names that are plainly paths. Each is refused.
PATHS = tuple(Line(tuple(words.split()), code=2) for words in (
    "generate nowhere/model.gguf a --max-tokens 1", "inspect nowhere/model.gguf", "verify nowhere/model.gguf",
    "quantize here/model --method rtn", f"eval q.gguf --base ./no-base {commands.CHUNK}"))
DRIVER = """
import json, sys
from llmc.cli import run
for words in json.loads(sys.argv[1]):
    print("CODE", run(words), *words, flush=True)
"""


@pytest.fixture(scope="module")
def lookups(made: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Every command, run once in one process and its children: .log (what was looked up), .codes, .home."""
    folder = tmp_path_factory.mktemp("network")
    (folder / "python").mkdir()
    (folder / "python" / "sitecustomize.py").write_text(RECORDER)
    home, work, log = folder / "home", folder / "work", folder / "log"
    home.mkdir()
    (work / "here").mkdir(parents=True)
    commands.prepare(work, made.base)
    log.touch()
    off = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "XDG_CACHE_HOME", "HF_HOME", "CI", "GITHUB_ACTIONS",
           "ORT_DISABLE_TELEMETRY")
    env = {k: v for k, v in os.environ.items() if k not in off} | {
        "HOME": str(home), "LLMC_TEST_LOG": str(log), "LLMC_CACHE": str(folder / "cache"),
        "PYTHONPATH": os.pathsep.join([str(folder / "python"), *filter(None, [os.environ.get("PYTHONPATH")])])}
    native = watched.possible()
    enter = [] if native else [*watched.ENTER, sys.executable, watched.__file__, str(log)]
    words = json.dumps([i.words for i in (*commands.LINES, *PATHS)])
    done = subprocess.run([*enter, sys.executable, "-c", DRIVER, words], env=env, cwd=work, capture_output=True, text=True,
                          timeout=600)
    codes = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("CODE ")]
    return SimpleNamespace(log=log.read_text().split(), codes=codes, home=home, native=native, env=env,
                           enter=enter, output=done.stdout + done.stderr)


def test_no_command_looks_anything_up(lookups: SimpleNamespace) -> None:
    assert {commands.command_of(i.words) for i in commands.LINES} == {*commands.every()}, "a command has no line"
    assert len(lookups.codes) == len((*commands.LINES, *PATHS)), lookups.output[-3000:]
    assert lookups.log == []


def test_the_commands_did_their_work(lookups: SimpleNamespace) -> None:
    """Otherwise the test above would say nothing."""
    wanted = [[str(i.code), *i.words] for i in (*commands.LINES, *PATHS)]
    assert lookups.codes == wanted, lookups.output[-6000:]


def test_no_device_id_is_written(lookups: SimpleNamespace) -> None:
    assert [str(p) for p in lookups.home.rglob("*") if "deviceid" in p.name.lower() or p.name == "Microsoft"] == []


@pytest.mark.parametrize("python", ["1", "0"])
def test_the_recorder_sees_a_look_up(lookups: SimpleNamespace, tmp_path: Path, python: str) -> None:
    """In Python, and natively by a name server."""
    if python == "0" and lookups.native:
        pytest.skip(f"look-ups of native code cannot be seen here: {lookups.native}")
    log = tmp_path / "log"
    log.touch()
    enter = [*lookups.enter[:-1], str(log)] if lookups.enter else []
    code = "import socket; socket.getaddrinfo('llmc.example.org', 80)"
    done = subprocess.run([*enter, sys.executable, "-c", code], capture_output=True, text=True,
                          env=lookups.env | {"LLMC_TEST_LOG": str(log), "LLMC_TEST_PYTHON": python})
    assert done.returncode != 0
    assert "llmc.example.org" in log.read_text().split()


@pytest.mark.parametrize("name", ["models/small.gguf", "org/weights.safetensors", "org/config.json", "here/small"])
def test_a_name_that_is_plainly_a_path_is_no_hub_id(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("here").mkdir()
    monkeypatch.setattr("llmc.sources.resolve._download", lambda *args: pytest.fail("it was looked for on the hub"))
    for find in (resolve_model, locate):
        with pytest.raises(UserError, match="not looked for on the hub") as e:
            find(name)
        assert f"{name}@main" in e.value.hint


@pytest.mark.parametrize("name", ["./a/b", "../a", "~/a/b", r"a\b", "/a/b", "a" * 5000, "a\0b", "~nobody-here/x"])
def test_other_names_that_are_no_hub_id(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmc.sources.resolve._download", lambda *args: pytest.fail("it was looked for on the hub"))
    with pytest.raises(UserError, match=r"there is no folder or file|cannot be a path"):
        resolve_model(name)


def test_a_hub_id_that_looks_like_a_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A revision says that the hub is meant; names of models with dots are hub ids as they are."""
    Path("org").mkdir()
    asked: list[tuple[str, str | None]] = []
    monkeypatch.setattr("llmc.sources.resolve._download", lambda *args: asked.append(args) or tmp_path)
    assert resolve_model("org/model.gguf@main") == resolve_model("someone/Qwen2.5-0.5B") == tmp_path
    assert asked == [("org/model.gguf", "main"), ("someone/Qwen2.5-0.5B", None)]


@pytest.mark.parametrize("version", ["3.6.0", None])
def test_data_sets_of_the_hub_run_no_scripts(version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    old = None if version is None else types.SimpleNamespace(__version__=version)
    monkeypatch.setitem(sys.modules, "datasets", old)
    with pytest.raises(UserError, match="4 or newer") as e:
        datasets_library("--calibration hf:NAME", "give a file")
    assert e.value.hint == "give a file, or pip install 'datasets>=4'"
