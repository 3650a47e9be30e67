"""Atomic writes of files and folders, so that no incomplete one is ever visible; their hashes; disk space."""

from __future__ import annotations

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

from llmc.errors import UserError
from llmc.machine import WINDOWS
from llmc.small_files import LARGE, read_json_object


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
    """os.replace, tried again for 1.5 seconds on Windows: it fails there while a mapping or a virus scanner has a file open."""
    for pause in (0.1, 0.2, 0.4, 0.8) if WINDOWS else ():
        try:
            os.replace(old, new)
            return
        except PermissionError:
            gc.collect()
            time.sleep(pause)
    os.replace(old, new)


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`. If the block ends without an error, fsync the file and rename it."""
    tmp = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield tmp
        fsync(tmp)
        _rename(tmp, path)
        fsync(path.parent)
    except PermissionError as e:
        raise UserError(f"no permission to write {path}", "choose another place with -o") from e
    finally:
        tmp.unlink(missing_ok=True)


@contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside `out`. If the block ends without an error, publish it, else delete it."""
    work = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        yield work
        publish_folder(work, out)
    except PermissionError as e:
        raise UserError(f"no permission to write {out}", "choose another place with -o") from e
    finally:
        shutil.rmtree(work, ignore_errors=True)


def publish_folder(work: Path, out: Path) -> None:
    """Fsync every file of the finished folder `work` and rename it to `out`, replacing an older artifact there."""
    for p in sorted(work.rglob("*")):
        fsync(p)
    fsync(work)
    if out.exists():
        old = out.with_name(f".{out.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        _rename(out, old)
        _rename(work, out)
        shutil.rmtree(old)
    else:
        _rename(work, out)
    fsync(out.parent)


def existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists. Raises UserError for a Windows drive that does not exist."""
    absolute = path.absolute()
    for place in (absolute, *absolute.parents):
        if place.exists():
            return place
    raise UserError(f"there is no drive {absolute.anchor}", "choose another place with -o")


def check_disk(where: Path, needed: int, what: str) -> None:
    """Raise UserError if the disk has less than `needed` bytes free. needed: the peak use of the job."""
    from llmc.console import size

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
