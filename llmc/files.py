"""Atomic writes of files and folders, so that no incomplete one is ever visible; their hashes; disk space."""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmc import temporary
from llmc.console import size, warn
from llmc.errors import UserError
from llmc.machine import WINDOWS
from llmc.sealed import read_sealed, sealed
from llmc.small_files import DELETE, LARGE, read_json_object


def sha256(path: Path) -> str:
    """The sha256 of a file, in hex, read in 1 MiB blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write deterministic JSON (sorted keys) under a temporary name, fsync it and rename it."""
    with staged_file(path) as tmp:
        tmp.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8",
                       newline="\n")


def fsync(path: Path) -> None:
    """Flush a file or a folder to the disk. Windows can flush only files that are open for writing, not folders."""
    if WINDOWS and path.is_dir():
        return
    fd = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _rename(old: Path, new: Path) -> None:
    """os.replace, tried again for 1.5 seconds on Windows, where it fails while a mapping or a scanner has a file open."""
    for pause in (0.1, 0.2, 0.4, 0.8) if WINDOWS else ():
        try:
            os.replace(old, new)
            return
        except PermissionError:
            gc.collect()
            time.sleep(pause)
    os.replace(old, new)


# What a system answers where nothing can be written.
REASONS = {
    errno.EACCES: "no permission to write {}", errno.EPERM: "no permission to write {}",
    errno.ENOSPC: "the disk is full: {} cannot be written",
    errno.EDQUOT: "your disk quota is used up: {} cannot be written",
    errno.EFBIG: "{} becomes too large for this disk or for the limit of this shell",
    errno.EROFS: "{} cannot be written: the disk is read-only",
    errno.ENAMETOOLONG: "{} cannot be written: the name is too long",
    errno.ENOTDIR: "{} cannot be written: a part of the path is a file, not a folder",
    errno.EEXIST: "{} cannot be written: a part of the path is a file, not a folder",
    errno.EISDIR: "{} cannot be written: it is a folder", errno.ELOOP: "{} cannot be written: its links lead in a circle",
    errno.ENOENT: "{} cannot be written: the system makes no files there",
}


@contextmanager
def writing(path: Path, hint: str = "choose another place with -o") -> Iterator[None]:
    """Turn what the system says when `path` cannot be written into a UserError. Errors about other places go on."""
    try:
        yield
    except OSError as e:
        named = [Path(os.fsdecode(f)).absolute() for f in (e.filename, e.filename2) if isinstance(f, str | bytes)]
        parent = path.absolute().parent
        near = all(p.parent == parent or p == parent or p in parent.parents for p in named)
        if e.errno not in REASONS or not (near if e.errno in (errno.EEXIST, errno.ENOENT) else
                                          near or all(parent in p.parents for p in named)):
            raise
        free = "free some space, or " if e.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise UserError(REASONS[e.errno].format(path), free + hint) from e


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """Yield an empty temporary file beside `path`. If the block ends without an error, fsync and rename it, else remove it.

    A link at `path` is replaced, not followed. Raises UserError where nothing can be written.
    """
    with writing(path), temporary.reserved(path, temporary.PARTIAL) as tmp:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.tidy(path)
        try:
            os.close(os.open(tmp, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0), 0o666))
            yield tmp
            fsync(tmp)
            _rename(tmp, path)
            fsync(path.parent)
        finally:
            temporary.remove(tmp)


@contextmanager
def work_folder(out: Path, hint: str = "choose another place with -o") -> Iterator[Path]:
    """Yield an empty folder beside `out`, to be published or not. Afterwards it is removed, if it is still there."""
    with writing(out, hint), temporary.reserved(out, temporary.PARTIAL) as work:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.tidy(out)
        try:
            work.mkdir()
            yield work
        finally:
            temporary.remove(work)


@contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside `out`. If the block ends without an error, publish it, else remove it."""
    with work_folder(out) as work:
        yield work
        publish_folder(work, out)


def publish_folder(work: Path, out: Path) -> None:
    """Fsync every file of the finished folder `work` and rename it to `out`, replacing an older artifact there.

    If this is interrupted, the older artifact is at `out` again. If the process is killed between the two renames,
    `temporary.restore` puts it back.
    """
    with writing(out), temporary.reserved(out, temporary.OLD) as old:
        for p in sorted(work.rglob("*")):
            fsync(p)
        fsync(work)
        temporary.tidy(out)
        try:
            if os.path.lexists(out):
                _rename(out, old)
            _rename(work, out)
            fsync(out.parent)
        finally:
            if not os.path.lexists(out) and os.path.lexists(old):
                _rename(old, out)
            temporary.remove(old)


def write_sealed(path: Path, values: dict[str, Any]) -> None:
    """`write_json` for a state of llmc's own, which `sealed.read_sealed` reads."""
    write_json(path, sealed(json.loads(json.dumps(values))))


def write_note(path: Path, values: dict[str, Any]) -> None:
    """`write_sealed` for what only helps a later run: if it cannot be written, that is a warning."""
    try:
        write_sealed(path, values)
    except (OSError, UserError) as e:
        warn(f"no note was kept: {e.problem if isinstance(e, UserError) else e}")


def read_note(path: Path) -> dict[str, Any]:
    """What `write_sealed` or `write_note` kept; {} if there is nothing, or, with a warning, if it is damaged: it can be made
    again."""
    if not os.path.lexists(path):
        return {}
    try:
        return read_sealed(path, DELETE)
    except UserError as e:
        warn(f"a note is made again: {e.problem}")
        return {}


def existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists. Raises UserError for a Windows drive that does not exist."""
    absolute = path.absolute()
    for place in (absolute, *absolute.parents):
        if place.exists():
            return place
    raise UserError(f"there is no drive {absolute.anchor}", "choose another place with -o")


def check_disk(where: Path, needed: int, what: str) -> None:
    """Raise UserError if the disk has less than `needed` bytes free. needed: the peak use of the job."""
    parent = existing(where)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UserError(f"{what} needs {size(needed)} of disk at its peak and {parent} has {size(free)} free",
                        "free some space or choose another disk with -o")


def cache_folder() -> Path:
    """The folder for files that llmc can make again: $LLMC_CACHE, else ~/.cache/llmc."""
    return Path(os.environ.get("LLMC_CACHE") or Path.home() / ".cache" / "llmc")


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    return read_json_object(path, LARGE, "download it again")
