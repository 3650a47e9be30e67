"""What Windows and macOS lack, taken away here: llmc says what it can and writes what it must."""

from __future__ import annotations

import builtins
import errno
import getpass
import io
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from llmc import cgroup, cli, files, locks, machine, streams
from llmc.about import doctor
from llmc.errors import UserError
from llmc.evals.compare import ship
from llmc.formats import manifest
from llmc.recipes import run as recipe_run
from llmc.runtimes.on_device import bench
from llmc.runtimes.targets import adb_shell, ssh
from llmc.runtimes.targets.target import Target
from llmc.temporary import final_name

pytestmark = pytest.mark.light


def without(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """These modules cannot be imported."""
    real = builtins.__import__

    def fails(name: str, *args: Any, **kwargs: Any) -> Any:
        if name in modules:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fails)


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """os.open as on Windows: no folders, and only what is open for writing can be flushed. Gives the files flushed."""
    opened: dict[int, tuple[Path, int]] = {}
    flushed: list[Path] = []
    real_open = os.open

    def open_(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        fd = real_open(path, flags, *args, **kwargs)
        opened[fd] = Path(path), flags
        return fd

    def fsync(fd: int) -> None:
        path, flags = opened[fd]
        if not flags & os.O_RDWR:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flushed.append(path)

    monkeypatch.setattr(files, "WINDOWS", True)
    monkeypatch.setattr(files.os, "open", open_)
    monkeypatch.setattr(files.os, "fsync", fsync)
    return flushed


def test_files_are_flushed_and_folders_are_not(windows: list[Path], tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"a": "ü"})
    assert (tmp_path / "a.json").read_bytes() == '{\n  "a": "ü"\n}\n'.encode()
    assert [final_name(p) for p in windows] == ["a.json"]
    with files.staged_folder(tmp_path / "small") as work:
        (work / "sub").mkdir()
        (work / "sub" / "weights").write_text("new")
    assert (tmp_path / "small" / "sub" / "weights").read_text() == "new"
    assert windows[-1].name == "weights"


@pytest.mark.parametrize("kind", [True, False], ids=["windows", "elsewhere"])
def test_a_rename_waits_for_who_has_the_file_open_on_windows_alone(kind: bool, tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    tries, pauses = [], []
    real = os.replace

    def busy(old: Path, new: Path) -> None:
        tries.append(old)
        if len(tries) < 3:
            raise PermissionError(errno.EACCES, "being used by another process")
        real(old, new)

    monkeypatch.setattr(files, "WINDOWS", kind)
    monkeypatch.setattr(files, "fsync", lambda path: None)
    monkeypatch.setattr(files.os, "replace", busy)
    monkeypatch.setattr(files.time, "sleep", pauses.append)
    if kind:
        files.write_json(tmp_path / "a.json", {})
        assert (len(tries), len(pauses)) == (3, 2)
    else:
        with pytest.raises(UserError, match="no permission to write"):
            files.write_json(tmp_path / "a.json", {})
        assert (len(tries), len(pauses)) == (1, 0)


def test_a_drive_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda self: False)  # the root itself, as Z:\ on Windows
    for look in (lambda p: files.check_disk(p, 1, "quantizing"), manifest.check_output, doctor._free):
        with pytest.raises(UserError, match="there is no drive"):
            look(tmp_path / "deep" / "model")


def test_memory_without_sysconf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "OWN", Path("/nowhere"))
    if hasattr(os, "sysconf"):
        assert machine.memory() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("sysconf", "sysconf_names"):
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=8 << 30))
    assert machine.memory() == 8 << 30
    without(monkeypatch, "psutil")
    with pytest.raises(UserError, match="psutil"):
        machine.memory()


def test_cores_without_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(machine, "CPUS", Path("/nowhere"))
    monkeypatch.setattr(cgroup, "OWN", Path("/nowhere"))
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 3)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert machine.physical_cores() == 3
    without(monkeypatch, "psutil")
    assert machine.physical_cores() == 6


@pytest.mark.parametrize("system", ["Darwin", "Windows"])
def test_peak_memory_without_proc(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_read", lambda path: "")
    monkeypatch.setattr(machine.platform, "system", lambda: system)
    if system == "Windows":
        without(monkeypatch, "resource")
        monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=123)))
    else:
        usage = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: SimpleNamespace(ru_maxrss=123))  # bytes there
        monkeypatch.setitem(sys.modules, "resource", usage)
    assert machine.peak_rss() == 123


def test_a_machine_that_tells_nothing_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    """No /proc, no /sys, no load average."""
    monkeypatch.setattr(machine, "_read", lambda path: "")
    monkeypatch.setattr(machine, "CPUS", Path("/nowhere"))
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(()))
    monkeypatch.delattr(os, "getloadavg", raising=False)
    found = machine.describe()
    assert found["cpu"]
    assert (found["cpu_features"], found["governor"], found["power"], found["temperature_c"]) == ([], None, None, None)
    assert set(machine.state().values()) == {None}
    assert machine.load_average() is None


def test_a_file_is_not_read_anew_without_fadvise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    (tmp_path / "m.gguf").write_bytes(b"x")
    bench.read_anew(tmp_path / "m.gguf")


def test_locks_of_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It locks bytes of a file by msvcrt, and an open file cannot be removed."""
    busy: list[tuple[int, int]] = []
    real = os.unlink

    def locking(fd: int, mode: int, count: int) -> None:
        busy.append((os.lseek(fd, 0, os.SEEK_CUR), count))
        if len(busy) > 1:
            raise PermissionError(errno.EACCES, "Permission denied")

    def unlink(path: Path, *args: Any, **kwargs: Any) -> None:
        assert not any(Path(f"/proc/self/fd/{n}").exists() and Path(f"/proc/self/fd/{n}").resolve() == Path(path).resolve()
                       for n in range(64))
        real(path, *args, **kwargs)

    without(monkeypatch, "fcntl")
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))
    monkeypatch.setattr(locks, "WINDOWS", True)
    monkeypatch.setattr(os, "unlink", unlink)
    with recipe_run.used(tmp_path / "run"):
        assert (tmp_path / "run" / ".run.json").stat().st_size
        with pytest.raises(UserError, match="small is being written by another process"), locks.locked(tmp_path / "small"):
            pass
    assert busy == [(locks.FAR, 1)] * 2
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_user_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise ModuleNotFoundError("No module named 'pwd'")

    monkeypatch.setattr(getpass, "getuser", nobody)
    assert ship._user() == "unknown"


def test_ssh_of_windows_is_refused_and_another_client_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "WINDOWS", True)
    target = Target("pi", "ssh://pi")
    with pytest.raises(UserError, match="ControlMaster") as e:
        ssh.Connection(target)
    assert "WSL" in e.value.hint
    monkeypatch.setenv(ssh.CLIENT, "no-such-client")
    with pytest.raises(UserError, match="no-such-client is not installed here"):
        ssh.Connection(target)


@pytest.mark.skipif(os.name == "nt", reason="POSIX shell")
def test_what_adb_says_in_another_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adb = tmp_path / "adb"
    adb.write_text("#!/bin/sh\nprintf 'ger\\344t' >&2; exit 1\n", encoding="utf-8")  # ä of Latin-1
    adb.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(UserError, match="ger\ufffdt"):
        adb_shell.connected(Target("phone", "adb:0123"))


@pytest.mark.parametrize("kind", [True, False], ids=["windows", "elsewhere"])
def test_output_in_a_pipe(kind: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(streams, "WINDOWS", kind)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp1252"))
    monkeypatch.setattr(cli, "run", lambda: print("1 → 2", end="") or 0 if kind else 0)
    with pytest.raises(SystemExit) as e:
        cli.main()
    assert e.value.code == 0
    assert raw.getvalue() == ("1 → 2".encode() if kind else b"")


@pytest.mark.parametrize(("kind", "error", "code"), [
    (False, BrokenPipeError(errno.EPIPE, "Broken pipe"), 0), (True, OSError(errno.EINVAL, "Invalid argument"), 0),
    (False, OSError(errno.EINVAL, "Invalid argument"), 2), (True, OSError(errno.ENOSPC, "No space left"), 2)])
def test_a_reader_that_has_gone(kind: bool, error: OSError, code: int, monkeypatch: pytest.MonkeyPatch,
                                capsys: pytest.CaptureFixture[str]) -> None:
    """`llmc … | head`: the pipe's end is BrokenPipeError on POSIX and EINVAL on Windows."""
    def flush() -> None:
        raise error

    moved: list[tuple[int, int]] = []
    monkeypatch.setattr(streams, "WINDOWS", kind)
    monkeypatch.setattr(cli, "run", lambda: 0)
    monkeypatch.setattr(streams.os, "dup2", lambda a, b: moved.append((a, b)))
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(flush=flush, fileno=lambda: 1, write=len))
    with pytest.raises(SystemExit) as e:
        cli.main()
    assert e.value.code == code
    assert len(moved) == 1
    assert ("cannot be written" in capsys.readouterr().err) == (code == 2)
