"""Two commands with the same output: the second is refused, or waits; a dead one keeps nobody out."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from killing import holding

import llmc
from llmc import cli, locks
from llmc.errors import UserError
from llmc.evals.report import store
from llmc.files import read_json
from llmc.locks import check_unlocked, lock_file, locked


def test_a_second_writer_is_refused_and_told_who_writes(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "small"
    with holding(out) as other:
        for call in (check_unlocked, lambda path: locked(path).__enter__()):
            with pytest.raises(UserError, match=f"small is being written by process {other.pid} on ") as e:
                call(out)
            assert e.value.hint == "wait for it or end it, or choose another place with -o"
        with locked(out.with_name("other")):  # another output
            pass
        other.communicate("\n")
    assert list(out.parent.iterdir()) == []
    check_unlocked(out)
    assert list(out.parent.iterdir()) == []


def test_a_dead_process_keeps_nobody_out(tmp_path: Path) -> None:
    out = tmp_path / "small"
    with holding(out) as other:
        other.kill()
        other.wait()
    assert lock_file(out).exists()
    with locked(out):
        assert str(os.getpid()) in lock_file(out).read_text()
    assert list(tmp_path.iterdir()) == []


def test_who_waits_gets_its_turn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report.json"
    with holding(out) as other:
        threading.Timer(locks.PATIENCE + 0.3, other.communicate, ["\n"]).start()
        with locked(out, wait=True):
            assert other.wait() == 0
    assert f"waiting for process {other.pid} on " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_command_in_a_command_holds_one_lock(tmp_path: Path) -> None:
    out = tmp_path / "small"
    with locked(out):
        with locked(out.parent / "." / "small"):
            pass
        assert lock_file(out).exists()
        refused: list[UserError] = []

        def elsewhere() -> None:
            try:
                check_unlocked(out)
            except UserError as e:
                refused.append(e)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert len(refused) == 1
    check_unlocked(out)


def test_many_threads_and_one_at_a_time(tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")

    def add() -> None:
        for _ in range(5):
            with locked(counter, wait=True):
                counter.write_text(str(int(counter.read_text()) + 1))

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter.read_text() == "20"
    assert list(tmp_path.iterdir()) == [counter]


@pytest.mark.skipif(os.name == "nt", reason="links")
def test_a_link_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    for make in (os.symlink, os.link):
        make(tmp_path / "precious", lock_file(tmp_path / "small"))
        with pytest.raises(UserError, match="is a link to another place"), locked(tmp_path / "small"):
            pass
        lock_file(tmp_path / "small").unlink()
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_disk_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fcntl = pytest.importorskip("fcntl")

    def flock(*args: object) -> None:
        raise OSError(locks.NO_LOCKS[0], "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path / "small"):
        pass
    assert "knows no locks: do not let two commands write it at once" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


COMMANDS = {
    "quantize": ("small", ["quantize", "BASE", "--method", "rtn"]), "prune": ("small", ["prune", "BASE", "--sparsity", "0.5",
                                                                                     "--method", "magnitude"]),
    "transform": ("small", ["transform", "BASE", "--scaling", "none", "--rotate", "r2"]),
    "imatrix": ("small.gguf", ["imatrix", "BASE", "--calibration", "TEXT", "--samples", "4", "--seq-len", "32"]),
    "heal": ("small", ["heal", "GPTQ", "--teacher", "BASE", "--calibration", "TEXT", "--steps", "1", "--held-out", "2",
                       "--seq-len", "32"]),
    "distill": ("small", ["distill", "BASE", "--teacher", "BASE", "--calibration", "TEXT", "--steps", "1", "--held-out", "2",
                            "--seq-len", "32"]),
    "export to GGUF": ("small.gguf", ["export", "GPTQ"]), "export to ONNX": ("small", ["export", "GPTQ", "--format", "onnx"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_writes_what_another_writes(name: str, made: SimpleNamespace, text: Path, tmp_path: Path,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    out, words = COMMANDS[name]
    given = {"BASE": str(made.base), "GPTQ": str(made.gptq), "TEXT": str(text)}
    with holding(tmp_path / out) as other:
        assert cli.run([*(given.get(w, w) for w in words), "--threads", "1", "-o", out]) == 2
        said = capsys.readouterr().err
        assert f"error: {out} is being written by process {other.pid} on " in said
        assert {p.name for p in tmp_path.iterdir()} <= {lock_file(tmp_path / out).name, ".llmc"}


def test_two_commands_at_once(made: SimpleNamespace, tmp_path: Path) -> None:
    """One writes the model, the other one is refused; the model is the one that a single command writes."""
    words = ["quantize", str(made.base), "--method", "rtn", "--threads", "1", "-o", "small"]
    both = [subprocess.Popen([sys.executable, "-P", "-m", "llmc", *words], stderr=subprocess.PIPE, stdout=subprocess.PIPE,
                             text=True) for _ in range(2)]
    said = [p.communicate()[1] for p in both]
    codes = [p.returncode for p in both]
    assert 0 in codes
    for code, text in zip(codes, said, strict=True):
        assert code == 0 or (code == 2 and "is being written by process" in text), text
    assert llmc.verify("small")["problems"] == []
    assert {p.name for p in tmp_path.iterdir()} == {"small", ".llmc"}


def test_reports_at_once_keep_what_the_other_wrote(tmp_path: Path, two_reports: list[Path]) -> None:
    """As of `llmc eval` and `llmc bench` with the same -o."""
    whole = store.read_report(two_reports[1])
    out = tmp_path / "report.json"

    def save(section: str) -> None:
        for _ in range(20):
            store.save(out, {k: v for k, v in whole.items() if k in ("schema", "kind", "artifact", "versions", section)})  # type: ignore[typeddict-item]
            assert section in read_json(out)

    threads = [threading.Thread(target=save, args=[s]) for s in ("quality", "speeds")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {"quality", "speeds"} <= read_json(out).keys()
