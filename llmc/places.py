"""The place of an output, checked before any work: it can be written, and neither an input nor another kind lies there."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llmc import temporary
from llmc.errors import UserError
from llmc.files import existing, writing

ELSEWHERE = "choose another place with -o"
OUTPUTS = ("out", "output", "outputs", "page", "markdown")  # fields of configs that name what is written
MODEL_FILES = ("config.json", "llmc.json", "genai_config.json")  # a folder with one of these is a model's or an artifact's


def check_place(out: Path, inputs: Iterable[Any] = (), folder: bool | None = False, hint: str = ELSEWHERE) -> None:
    """Raise UserError unless a file (or a folder; None: either) can be written at `out` without harm to what is read.

    inputs: what the command reads: paths, text that may name one, configs, or lists of these; None and other text is skipped.
    Dead runs' remains beside `out` are removed, and an artifact that such a run was about to replace is put back.
    """
    if out.name in ("", ".."):
        raise UserError(f"{out} cannot be written: it is a folder that is in use", hint)
    with writing(out, hint):
        temporary.tidy(out)
        for path in read_by(*inputs):
            _check_input(out, path, folder, hint)
        _check_kind(out, folder, hint)
        parent = existing(out.absolute().parent)
        if not os.access(parent, os.W_OK):
            raise UserError(f"no permission to write into {parent}", hint)
        _try_to_write(parent, out)


def read_by(*values: Any) -> Iterator[Path]:
    """The paths that exist among the values: of configs all fields but outputs; of 'NAME=FILE' the file too."""
    for value in values:
        if dataclasses.is_dataclass(value):
            yield from read_by(*(getattr(value, f.name) for f in dataclasses.fields(value) if f.name not in OUTPUTS))
        elif isinstance(value, str | Path):
            texts = [str(value), *str(value).partition("=")[2:]]
            yield from (path for text in texts if text and _exists(path := Path(text).expanduser()))
        elif isinstance(value, Iterable):
            yield from read_by(*value)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError, RuntimeError):  # text that no path can be
        return False


def real(path: Path) -> Path:
    """The path without links. Unlike Path.resolve it accepts links that lead in a circle: they are the last part then."""
    return Path(os.path.realpath(path))


def _check_input(out: Path, path: Path, folder: bool | None, hint: str) -> None:
    place, read = real(out), real(path)
    if place == read or (out.exists() and out.samefile(path)):
        named = "" if str(out) == str(path) else f"{path}, "
        raise UserError(f"the output {out} is {named}what is read, and it would be lost", hint)
    if place in read.parents and (folder or place.exists()):
        raise UserError(f"the output {out} is a folder around {path}, which is read: it would be lost", hint)
    if folder and read in place.parents and any((read / name).is_file() for name in MODEL_FILES):
        raise UserError(f"the output {out} lies inside {path}, which is read: a model does not hold another", hint)


def _check_kind(out: Path, folder: bool | None, hint: str) -> None:
    """What lies at `out` is of the kind that is written there."""
    if folder and out.is_symlink():
        raise UserError(f"{out} is a link to {os.readlink(out)}, and a link is not replaced by a folder", hint)
    if folder is False and out.is_dir():
        raise UserError(f"{out} is a folder, and a file is written", f"name a file with -o, such as {out / 'NAME'}"
                        if hint == ELSEWHERE else hint)
    if folder and out.is_file():
        raise UserError(f"{out} is a file, and a folder is written", hint)
    if out.exists() and not out.is_dir() and not out.is_file():
        raise UserError(f"{out} is a device or a pipe, and only files are written", hint)


def _try_to_write(parent: Path, out: Path) -> None:
    """Make an empty file and remove it: permissions alone do not tell of a full disk, a quota or a strange file system."""
    with temporary.reserved(parent / out.name, temporary.PARTIAL) as probe:
        try:
            os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        finally:
            temporary.remove(probe)


def check_page(path: Path, inputs: Iterable[Any] = (), hint: str = ELSEWHERE) -> None:
    """`check_place` for an HTML page: a file that lies there already must be one, or be empty."""
    check_place(path, inputs, hint=hint)
    if (start := _start(path)) and not start.startswith(("<!doctype html", "<html")):
        raise UserError(f"{path} is there already and is no page", hint)


def check_markdown(path: Path, inputs: Iterable[Any] = (), hint: str = ELSEWHERE) -> None:
    """`check_place` for Markdown: a file that lies there already must be text, and neither JSON nor a page."""
    check_place(path, inputs, hint=hint)
    if (start := _start(path)) and ("\0" in start or start.startswith(("{", "[", "<!doctype", "<html", "gguf"))):
        raise UserError(f"{path} is there already and is no Markdown", hint)


def _start(path: Path) -> str:
    """The first characters of a file, in lower case; '' if there is none."""
    if not path.is_file():
        return ""
    with path.open("rb") as f:
        return f.read(200).decode("utf-8", "replace").lstrip("\ufeff \n\r\t").lower()
