"""Outputs that are closed, narrow or no terminal, and signals: no traceback, no control characters, the right exit code."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from killing import Command
from tiny import build

from llmc import console
from llmc.cli import run

LLMC = [sys.executable, "-P", "-m", "llmc"]
posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX shell and signals")


def shell(command: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, check=False)


@posix
@pytest.mark.parametrize("closing", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams(made: SimpleNamespace, closing: str) -> None:
    llmc = shlex.join(LLMC)
    before = made.gguf.read_bytes()
    assert shell(f"{llmc} verify {made.gguf} {closing}").returncode == 0
    assert shell(f"{llmc} inspect nowhere {closing}").returncode == 2
    assert made.gguf.read_bytes() == before


@posix
def test_a_file_that_is_written_does_not_get_the_number_of_a_closed_stream(made: SimpleNamespace, tmp_path: Path) -> None:
    done = shell(f"{shlex.join(LLMC)} quantize {made.base} --method rtn -o {tmp_path / 'q'} >&- 2>&-")
    assert done.returncode == 0
    assert run(["verify", str(tmp_path / "q")]) == 0


@posix
def test_readers_that_leave_early(made: SimpleNamespace) -> None:
    llmc = shlex.join(LLMC)
    for command in (f"{llmc} inspect {made.gguf} --tensors --json | head -c 1", f"{llmc} --help | true",
                    f"{llmc} verify nowhere 2>&1 | true", f"{llmc} quantize {made.base} --method rtn --dry-run 2>&1 | true"):
        done = shell(command)
        assert done.returncode in (0, 2), command
        assert done.stderr == b"", command


@posix
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full")
def test_results_that_cannot_be_printed(made: SimpleNamespace) -> None:
    done = shell(f"{shlex.join(LLMC)} verify {made.gguf} > /dev/full")
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: ")


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "ascii"])
def test_narrow_terminals(encoding: str, tmp_path: Path) -> None:
    env = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    for command in ([], ["quantize"], ["compare"], ["eval"]):
        done = subprocess.run([*LLMC, *command, "--help"], capture_output=True, env=env, check=False)
        assert done.returncode == 0
        assert b"Traceback" not in done.stderr
    done = subprocess.run([*LLMC, "inspect", "né…日🙂"], capture_output=True, env=env, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr


def test_json_stays_json_on_a_narrow_terminal() -> None:
    """A character that the encoding lacks is written as JSON writes it."""
    code = ("import json; from llmc import streams; streams.prepare();"
            "print(json.dumps({'text': 'é…日🙂'}, ensure_ascii=False))")
    for encoding in ("latin-1", "ascii"):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True,
                              env=os.environ | {"PYTHONIOENCODING": encoding})
        assert json.loads(done.stdout.decode(encoding)) == {"text": "é…日🙂"}


@pytest.mark.parametrize(("env", "shown"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_control_characters(env: dict[str, str], shown: bool, monkeypatch: pytest.MonkeyPatch,
                            capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    for terminal in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        with console.progress("layer", 2) as p:
            p.step()
            p.step()
        assert ("\x1b" in capsys.readouterr().err) == (shown and terminal)


def test_messages_without_a_reader_do_not_stop_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def flush(self) -> None:
            raise BrokenPipeError

        def isatty(self) -> bool:
            return True

    for stream in (Gone(), None):
        monkeypatch.setattr(sys, "stderr", stream)
        console.say("working")
        console.warn("mind this")
        with console.progress("layer", 1) as p:
            p.step()


@posix
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_signals_clean_up(tmp_path: Path, text: Path, number: int) -> None:
    base = build("llama", tmp_path / "base", num_hidden_layers=8)
    command = Command("quantize", base, "--calibration", text, "--samples", 16, "--seq-len", 64)
    code, err = command.kill(tmp_path / "q", ".q.unfinished/layers/0001.json", by=number)
    assert code == 128 + number
    assert err.splitlines()[-1] == "interrupted; no half-written artifact was left"
    assert "Traceback" not in err
    assert not [p for p in tmp_path.rglob("*") if p.name.endswith(".partial")]


@posix
def test_nohup_goes_on(made: SimpleNamespace, tmp_path: Path) -> None:
    process = subprocess.Popen(["bash", "-c", f"trap '' HUP; exec {shlex.join(LLMC)} quantize {made.base} --method rtn -o q"],
                               cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    time.sleep(1)  # bash has set its trap
    while process.poll() is None:
        process.send_signal(signal.SIGHUP)
        time.sleep(0.2)
    assert process.returncode == 0


def test_printed_commands_can_be_pasted(made: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "my model's $(q)"
    assert run(["quantize", str(made.base), "--method", "rtn", "-o", str(out)]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("next: "))
    if os.name != "nt":
        assert shlex.split(line) == ["next:", "llmc", "export", "--format", "gguf", str(out)]
