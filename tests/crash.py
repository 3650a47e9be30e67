"""A process that dies before the n-th of its calls that change a file, played in this process, and the files it left."""

from __future__ import annotations

import builtins
import hashlib
import io
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from llmc import temporary

NOTES = (".hashes.json", "step-times.json")  # they depend on the clock and on how often a command ran
# Values that depend on the clock, by their keys in JSON files.
CLOCK = ("accuracy_levels", "accuracy_reason", "at", "created", "files", "resumed", "seconds", "speeds",
         "bytes", "left", "crc32")  # of a step's reports and records, which hold seconds

TIME = re.compile("(–|# s|# min # s|# h # min)( \\(resumed\\))?".encode())  # of a step, on a page; digits are # there


class Dead(BaseException):
    """The process is gone. No handler of `Exception` and no `finally` may touch a file any more."""


class Calls:
    """Counts the calls that change files below `folder`, and ends the process before number `at` (from 1; 0: never).

    at once: every later call fails too, as after SIGKILL. Otherwise only this one is interrupted, as by Ctrl-C.
    look: is told the number of each call before it happens. Calls of other threads wait meanwhile.
    """

    def __init__(self, folder: Path, at: int = 0, at_once: bool = True, look: Callable[[int], None] | None = None) -> None:
        self.folder, self.at, self.at_once, self.count, self.look = str(folder), at, at_once, 0, look
        self._one, self._looking = threading.RLock(), False

    def before(self, *places: Any) -> None:
        named = [os.fsdecode(p) for p in places if isinstance(p, str | bytes | os.PathLike)]
        if named and not any(os.path.abspath(p).startswith(self.folder) for p in named):
            return
        with self._one:
            if self._looking:  # the look itself copies files, in this thread
                return
            self.count += 1
            if self.look is not None:
                self._looking = True
                try:
                    self.look(self.count)
                finally:
                    self._looking = False
            if self.at and (self.count == self.at or (self.at_once and self.count > self.at)):
                raise Dead if self.at_once else KeyboardInterrupt


@contextmanager
def counted(calls: Calls) -> Iterator[Calls]:
    """Inside, file calls are counted."""
    def wrapped(real: Callable[..., Any], writes: Callable[..., bool] = lambda *a, **k: True) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if writes(*args, **options):
                calls.before(*(() if "dir_fd" in options else args[:2] if real in two else args[:1]))
            return real(*args, **options)
        return call

    two = (os.replace, os.rename)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "replace", "rename", "mkdir", "rmdir", "unlink"):
            patch.setattr(os, name, wrapped(getattr(os, name)))
        patch.setattr(os, "open", wrapped(os.open, lambda path, flags, *a, **k: bool(flags & os.O_CREAT)))
        opened = wrapped(io.open, lambda file, mode="r", *a, **k: not isinstance(file, int) and mode.strip("tb") != "r")
        patch.setattr(io, "open", opened)
        patch.setattr(builtins, "open", opened)
        yield calls


def died(make: Callable[[], Any], folder: Path, at: int, at_once: bool) -> bool:
    """Run `make` until its call number `at`. False if it was finished before."""
    try:
        with counted(Calls(folder, at, at_once)):
            make()
    except (Dead, KeyboardInterrupt):
        return True
    return False


def number_of_calls(make: Callable[[], Any], folder: Path) -> int:
    """How many file calls `make` needs."""
    with counted(Calls(folder)) as calls:
        make()
    return calls.count


def listing(folder: Path) -> set[str]:
    """Every file and folder below `folder`."""
    with suppress(FileNotFoundError):
        return {p.relative_to(folder).as_posix() for p in folder.rglob("*")}
    return set()


def steady(folder: Path, home: Path | None = None) -> dict[str, Any]:
    """{path: what two equal runs leave in it} of every file and folder: all but what depends on the clock or the place.

    home: where the folder was when the command ran."""
    found: dict[str, Any] = {name: _steady(folder / name, home or folder) for name in listing(folder)}
    return {name: value for name, value in found.items() if Path(name).name not in NOTES}


def state_of(folder: Path, home: Path | None = None) -> str:
    """A hash of what lies in a folder. Two states differ if more than the clock and the tokens of temporary names does."""
    found = sorted((temporary.NAME.sub(lambda m: f".{m['label']}.{m['end']}", name), repr(value))
                   for name, value in steady(folder, home).items())
    return hashlib.sha256(repr(found).encode()).hexdigest()


class States:
    """The states that a folder has before each file call of a command: what the command leaves if it is killed there.

    at: {number of the call: number of the first call before which the folder was the same}; of each such state there is a
    copy in the folder `kept`."""

    def __init__(self, folder: Path, kept: Path) -> None:
        self.folder, self.kept, self.at = folder, kept, dict[int, int]()
        self._first: dict[str, int] = {}

    def look(self, number: int) -> None:
        def copied(file: str, to: str) -> None:
            with suppress(FileNotFoundError):  # a call of another thread had begun, and has just removed it
                shutil.copy2(file, to, follow_symlinks=False)

        copy = shutil.copytree(self.folder, self.kept / str(number), symlinks=True, copy_function=copied)
        self.at[number] = first = self._first.setdefault(state_of(copy, self.folder), number)
        if first != number:
            shutil.rmtree(copy)


def _steady(path: Path, folder: Path) -> Any:
    if path.is_dir() or path.is_symlink():
        return "a folder or a link"
    data = path.read_bytes()
    if path.suffix == ".json" and data:
        return _without_clock(json.loads(data.replace(os.fsencode(folder), b"HERE")))
    if path.suffix in (".html", ".md", ".toml"):
        text = re.sub(rb'<svg[^>]*aria-label="seconds">.*?</svg>', b"a chart", data.replace(os.fsencode(folder), b"HERE"))
        return TIME.sub(b"a time", re.sub(rb"[0-9][0-9.,:T+-]*", b"#", text))
    return data


def _without_clock(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: type(v).__name__ if k in CLOCK else _without_clock(v) for k, v in value.items()}
    return [_without_clock(v) for v in value] if isinstance(value, list) else value
