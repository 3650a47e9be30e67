"""What every command shares: start-up without the heavy libraries, errors in one line, exit codes."""

from __future__ import annotations

import ast
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import safetensors
import typer

import llmc.about.verification
import llmc.cli
from llmc.cli import app, run
from llmc.cli.group import TABLE
from llmc.errors import GateFailedError, UserError

COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
LLMC = Path(sys.executable).with_name("llmc")


def llmc_process(*args: str, **kwargs: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "llmc", *args], capture_output=True, text=True, **kwargs)  # type: ignore[call-overload, no-any-return]


def test_help_imports_nothing_heavy() -> None:
    """Not a timing: what makes a command line slow to start is what it imports."""
    code = f"""
import contextlib, io, json, sys
import llmc, llmc.cli
pages = {{}}
for args in [[], *([c] for c in {COMMANDS})]:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert llmc.cli.run([*args, "--help"]) == 0
    pages[" ".join(args)] = out.getvalue()
heavy = "torch transformers numpy gguf llama_cpp tokenizers safetensors jinja2 rich pydantic".split()
print(json.dumps({{"heavy": [m for m in heavy if m in sys.modules], "pages": pages}}))
"""
    found = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert found["heavy"] == []
    assert len(found["pages"]) == len(COMMANDS) + 1
    for name, page in found["pages"].items():
        assert page.startswith(f"Usage: llmc {name}".rstrip()), page[:60]


@pytest.mark.parametrize(("args", "imported"), [
    (["--help"], []), (["verify", "--help"], ["verify"]), (["run", "-h"], ["options", "run_recipe"])])
def test_only_the_named_command_is_imported(args: list[str], imported: list[str]) -> None:
    code = f"import llmc.cli, sys; llmc.cli.run({args}); print(sorted(m for m in sys.modules if m.startswith('llmc.cli.')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ast.literal_eval(done.stdout.splitlines()[-1]) == sorted(["llmc.cli.group", *(f"llmc.cli.{m}" for m in imported)])


def test_every_module_of_a_command_is_listed() -> None:
    no_commands = {"__init__", "group", "options", "target_setup"}  # the last is the second half of `target`
    files = {p.stem for p in Path(llmc.cli.__file__).parent.glob("*.py")} - no_commands
    assert {module for module, _ in TABLE.values()} == files
    for _, line in TABLE.values():
        assert line.endswith(".")
        assert len(line) <= 60


def test_all_commands_are_there() -> None:
    expected = {"quantize", "distill", "heal", "imatrix", "export", "eval", "bench", "compare", "generate", "inspect",
                "prune", "recipe", "run", "sweep", "target", "verify", "doctor"}
    assert expected <= set(COMMANDS)


@pytest.mark.parametrize("spelling", [[str(LLMC)], [sys.executable, "-m", "llmc"]])
def test_both_spellings(spelling: list[str]) -> None:
    done = subprocess.run([*spelling, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"llmc {llmc.__version__}\n"


@pytest.mark.parametrize("args", ["nonsense", "verify", "verify --nonsense x", "bench --generate many x", "--nonsense"])
def test_usage_errors(args: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(args.split()) == 2
    out = capsys.readouterr()
    assert "Usage: llmc" in out.err
    assert out.out == ""


def test_users_error_is_two_lines_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "nowhere"]) == 2
    out = capsys.readouterr()
    assert out.out == ""
    assert out.err == "error: nowhere is neither a model folder nor a .gguf file\nnext: give one of these\n"


def full_disk() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device", "small.gguf")


@pytest.mark.parametrize(
    ("error", "code", "first"),
    [
        (UserError("bad", "mend it"), 2, "error: bad"),
        (UserError("bad"), 2, "error: bad"),
        (GateFailedError("perplexity rose"), 1, "error: perplexity rose"),
        (KeyboardInterrupt(), 130, "interrupted; "),
        (MemoryError(), 2, "error: out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: …"), 2, "error: out of memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), 2, "error: out of memory"),
        (full_disk(), 2, "error: the disk is full"),
        (safetensors.SafetensorError("I/O error: No space left on device (os error 28)"), 2, "error: the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), 2, "error: no permission"),
    ],
)
def test_exit_codes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException,
                    code: int, first: str) -> None:
    def fails(artifact: Path) -> None:
        raise error

    monkeypatch.setattr(llmc.about.verification, "verify", fails)
    assert run(["verify", "x"]) == code
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(first)
    assert len(lines) <= 2


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(artifact: Path) -> None:
        raise ZeroDivisionError("of our making")

    monkeypatch.setattr(llmc.about.verification, "verify", fails)
    assert run(["verify", "x"]) == 70
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "ZeroDivisionError: of our making" in err
    assert err.splitlines()[-1].startswith("This is a bug in llmc")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_real_ctrl_c(tmp_path: Path) -> None:
    big = tmp_path / "big.gguf"
    with big.open("wb") as f:
        f.truncate(1 << 40)  # sparse: hashing it would take many minutes
    process = subprocess.Popen([sys.executable, "-m", "llmc", "verify", str(big)], stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while str(big) not in [f.path for f in psutil.Process(process.pid).open_files()]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err.splitlines() == ["interrupted; no half-written artifact was left"]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX shell")
def test_a_reader_that_leaves_early(made: SimpleNamespace) -> None:
    command = f"'{sys.executable}' -m llmc inspect '{made.gguf}' --json --tensors | head -1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == "{\n"
    assert done.stderr == ""


def test_results_and_chatter_go_separate_ways(made: SimpleNamespace) -> None:
    done = llmc_process("verify", str(made.gptq), "--json", check=True)
    assert json.loads(done.stdout)["problems"] == []
    assert done.stderr == ""


@pytest.mark.skipif(sys.platform == "win32", reason="bash")
def test_completion() -> None:
    for typed, completed in (("llmc ver", "verify"), ("llmc inspect --t", "--tensors")):
        env = {"_LLMC_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
        done = subprocess.run([str(LLMC)], env=os.environ | env, capture_output=True, text=True, check=True)
        assert done.stdout.split() == [completed]


@pytest.mark.skipif(sys.platform == "win32", reason="bash")
def test_completion_script() -> None:
    """A shell started from a shell: typer looks at its parents to learn which."""
    command = f"'{LLMC}' --show-completion; true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert "_LLMC_COMPLETE=complete_bash" in done.stdout


def test_quiet_silences_talk_but_not_warnings(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from llmc.console import say, warn

    assert run(["--quiet", "inspect", str(tmp_path)]) == 2
    say("chatter")
    warn("mind this")
    err = capsys.readouterr().err
    assert "chatter" not in err
    assert "warning: mind this" in err
    assert "error:" in err
