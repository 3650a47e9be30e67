"""Temporary names beside an output, and what dead processes left under such names.

    .NAME.HOST-PROCESS-TOKEN.partial   a file or folder that is being written
    .NAME.HOST-PROCESS-TOKEN.old       the older output while a new one takes its place

The token is random: nobody can put a link under the name before llmc uses it. Host and process tell whose it is: the next run
of the same output removes what a dead process left, and puts an older output back if its name is free.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llmc.machine import WINDOWS

PARTIAL, OLD = "partial", "old"
NAME = re.compile(r"\.(?P<label>.+)\.(?P<host>[0-9a-f]{6})-(?P<process>\d+)-(?P<token>[0-9a-f]{16})\.(?P<end>partial|old)",
                  re.DOTALL)
# Files that say that a folder is whole or can be gone on with. They are removed first, so that a folder whose removal was cut
# short is taken for neither.
MARKS = ("llmc.json", "fingerprint.json", ".done.json", ".started.json")
LONGEST = 160  # bytes of the output's name that a temporary name repeats; file systems allow 255 for all of it
_used: set[str] = set()  # tokens that this process uses now


@contextmanager
def reserved(path: Path, end: str) -> Iterator[Path]:
    """Yield a new temporary name for the output `path`. Afterwards it counts as left over, if it is still there."""
    token = secrets.token_hex(8)
    _used.add(token)
    try:
        yield path.with_name(f".{label(path)}.{_host()}-{os.getpid()}-{token}.{end}")
    finally:
        _used.discard(token)


def restore(path: Path) -> None:
    """If the output is gone because a run died between two renames, give the older one its name back."""
    if not os.path.lexists(path):
        for old in _left(path, OLD)[:1]:
            os.rename(old, path)


def tidy(path: Path) -> None:
    """Remove what dead processes left beside the output `path`, after `restore`."""
    restore(path)
    for left in [*_left(path, PARTIAL), *_left(path, OLD)]:
        remove(left)


def remove(path: Path) -> None:
    """Remove a file or folder if it is there. An interrupt during this is raised after a second attempt."""
    try:
        _remove(path)
    except BaseException:
        _remove(path)
        raise


def final_name(path: Path) -> str:
    """The name that a temporary file will have."""
    found = NAME.fullmatch(path.name)
    return found["label"] if found else path.name


def label(path: Path) -> str:
    """The output's name, shortened if a temporary name would become too long for the file system."""
    raw = os.fsencode(path.name)
    if len(raw) <= LONGEST:
        return path.name
    return os.fsdecode(raw[:100].decode("utf-8", "ignore").encode()) + hashlib.sha256(raw).hexdigest()[:16]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        for mark in MARKS:
            for file in path.rglob(mark):
                file.unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _left(path: Path, end: str) -> list[Path]:
    """The names with this end that dead processes left beside `path`, the newest first."""
    try:
        names = os.listdir(path.parent)
    except OSError:  # no such folder, or one that may not be read: nothing can be removed there
        return []
    own = label(path)
    found = [(n, m) for n in names if (m := NAME.fullmatch(n)) and m["label"] == own and m["end"] == end]
    dead = [path.with_name(n) for n, m in found if m["host"] == _host() and not _alive(int(m["process"]), m["token"])]
    return sorted(dead, key=lambda p: p.lstat().st_mtime_ns if os.path.lexists(p) else 0, reverse=True)


def _alive(process: int, token: str) -> bool:
    """Whether the process that made a name still runs."""
    if process == os.getpid():
        return token in _used
    if WINDOWS:  # os.kill would end the process there
        import psutil

        return psutil.pid_exists(process)
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    try:  # a zombie has a number and runs no more
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return True


def _host() -> str:
    """Six hex digits of this machine's name: process numbers of another machine on the same disk say nothing here."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:6]
