"""One writer at a time for each output.

Who writes `small` locks the file `.small.lock` beside it, which names the process, and removes it at the end. The system
takes the lock from a process that dies: the file that it left keeps nobody out.
"""

from __future__ import annotations

import errno
import os
import platform
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmc.console import say, warn
from llmc.errors import UserError
from llmc.files import writing
from llmc.machine import WINDOWS
from llmc.temporary import label, remove

PAUSE = 0.05  # seconds between two attempts
PATIENCE = 1.0  # seconds after which a wait is said
MOST = 300  # bytes of a lock file that are read
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)  # of file systems that know none
FAR = 1 << 30  # Windows keeps others from reading locked bytes: the locked one lies behind the text
_held: dict[Path, int] = {}  # {lock file: the thread of this process that holds it}


class _Busy(Exception):  # noqa: N818 - it is no error where the caller waits
    """Another process, or another thread of this one, holds the lock."""


@contextmanager
def locked(path: Path, wait: bool = False, inside: bool = False) -> Iterator[None]:
    """Be the only one that writes the output `path`. A command that calls another for the same output holds one lock.

    wait: until another writer has finished, for what takes no time or serves both. Otherwise this raises UserError, with the
    path and the process of the other writer.  inside: the lock lies in the folder `path`, not beside it.
    """
    file = lock_file(path, inside)
    if _held.get(file) == threading.get_ident():
        yield
        return
    with writing(path):
        file.parent.mkdir(parents=True, exist_ok=True)
    fd = _wait(file, path) if wait else _take_or_refuse(file, path)
    try:
        yield
    finally:
        _release(file, fd)


def check_unlocked(path: Path) -> None:
    """Raise UserError if another process writes `path` now."""
    if lock_file(path).exists():
        with locked(path):
            pass


def lock_file(path: Path, inside: bool = False) -> Path:
    """The file that is locked for the output `path`, the same for all names of its folder."""
    place = path.absolute()
    return place.resolve() / ".lock" if inside else place.parent.resolve() / f".{label(place).lstrip('.')}.lock"


def _take_or_refuse(file: Path, path: Path) -> int:
    try:
        return _take(file, path)
    except _Busy as e:
        raise UserError(f"{path} is being written by {_holder(file)}",
                        "wait for it or end it, or choose another place with -o") from e


def _wait(file: Path, path: Path) -> int:
    begun, told = time.monotonic(), False
    while True:
        try:
            return _take(file, path)
        except _Busy:
            if not told and time.monotonic() - begun > PATIENCE:
                say(f"waiting for {_holder(file)}, which writes {path}")
                told = True
            time.sleep(PAUSE)


def _take(file: Path, path: Path) -> int:
    """Lock the file and write this process into it. Returns its descriptor; raises _Busy."""
    while True:
        fd = _open(file, path)
        try:
            if file in _held or not _lock(fd, path):
                raise _Busy
            if _is(fd, file):
                _held[file] = threading.get_ident()
                os.ftruncate(fd, 0)
                os.write(fd, f"process {os.getpid()} on {platform.node()}\n".encode()[:MOST])
                return fd
        except BaseException:
            if _held.get(file) == threading.get_ident():
                del _held[file]
            os.close(fd)
            raise
        os.close(fd)  # its holder has just removed this file


def _open(file: Path, path: Path) -> int:
    """Open the lock file, which may be new. A link, to which this process would write, is refused."""
    if not file.is_symlink():
        with writing(path):
            fd = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        found = os.fstat(fd)
        if stat.S_ISREG(found.st_mode) and found.st_nlink <= 1:
            return fd
        os.close(fd)
    raise UserError(f"{file}, by which llmc keeps two writers apart, is a link to another place", "remove the link")


def _is(fd: int, file: Path) -> bool:
    """Whether the open file still has its name."""
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(file))
    except FileNotFoundError:
        return False


def _lock(fd: int, path: Path) -> bool:
    """Lock an open file for this process; False if another one has locked it."""
    try:
        if WINDOWS:
            _lock_on_windows(fd)
        else:
            import fcntl

            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as e:
        if WINDOWS and e.errno in (errno.EACCES, errno.EDEADLK):
            return False
        if e.errno not in NO_LOCKS:
            raise
        warn(f"the disk of {path} knows no locks: do not let two commands write it at once")
    return True


def _lock_on_windows(fd: int) -> None:
    import msvcrt

    os.lseek(fd, FAR, os.SEEK_SET)
    msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]
    os.lseek(fd, 0, os.SEEK_SET)


def _release(file: Path, fd: int) -> None:
    """Remove the lock file and unlock it, in this order: who has opened it sees that its name is gone."""
    try:
        if not WINDOWS:
            remove(file)
    finally:
        _held.pop(file, None)
        os.close(fd)
    if WINDOWS:  # it keeps an open file from being removed, also by this process
        remove(file)


def _holder(file: Path) -> str:
    """Who holds a lock, as its file says: 'process 17 on HOST'."""
    try:
        with file.open("rb") as f:
            return f.read(MOST).decode(errors="replace").strip() or "another process"
    except OSError:
        return "another process"
