"""The header of a GGUF file, read without a library: metadata and the table of tensors, everything checked.

llama.cpp and the package gguf trust a file: a flipped type or length makes them abort, or allocate without a limit. So every
file is read here first. This module runs on devices too.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from stat import S_ISREG
from typing import Any

from llmc.errors import UserError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
KEPT = 4096  # longer arrays of numbers are checked and counted only
MOST_NAME, MOST_DIMS = 65535, 4
# ggml's tensor types: {number: (weights of a block, bytes of a block)}
TYPES = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 40), 10: (256, 84),
    11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 16: (256, 66), 17: (256, 74),
    18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2),
    26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17), 40: (64, 36),
    41: (128, 18),
}


@dataclass(frozen=True)
class Array:
    """An array of the metadata. kind: the number of its elements' type. values: empty for strings and for long arrays."""

    kind: int
    count: int
    values: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Entry:
    """A tensor of the table. shape: innermost dimension first, as the file has it. start, nbytes: its place in the file."""

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    version: int
    fields: dict[str, Any]
    tensors: tuple[Entry, ...]


def read_header(file: Path) -> Header:
    """The header of a GGUF file. Raises UserError, with the place of the fault, for a file that is damaged or cut off."""
    try:
        stat = file.stat()
    except FileNotFoundError as e:
        raise UserError(f"there is no file {file}", "give a .gguf file") from e
    except OSError as e:
        raise UserError(f"{file} cannot be read: {e.strerror}", "give a .gguf file") from e
    if not S_ISREG(stat.st_mode):
        raise UserError(f"{file} is not a regular file", "give a .gguf file")
    return _read(file, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=4)
def _read(file: Path, modified: int, length: int) -> Header:
    try:
        with file.open("rb") as f:
            if f.read(4) != MAGIC:
                raise DamageError("it does not begin with GGUF")
            with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(data, length).header()
    except OSError as e:
        raise UserError(f"{file} cannot be read: {e.strerror}", "give a .gguf file") from e
    except DamageError as e:
        raise UserError(f"{file} is not a complete GGUF file: {e}", "download or export it again") from e


class DamageError(Exception):
    """What is wrong with a file."""


class _Reader:
    def __init__(self, data: mmap.mmap, length: int) -> None:
        self.data, self.length, self.at = data, length, 4

    def header(self) -> Header:
        version = self.number("I")
        if version not in VERSIONS:
            raise DamageError(f"it has version {version}; llmc reads {' and '.join(map(str, VERSIONS))}")
        n_tensors, n_fields = self.number("Q"), self.number("Q")
        if max(n_tensors, n_fields) * 16 > self.length:  # an entry of either kind takes more bytes
            raise DamageError(f"its {self.length:,} bytes cannot hold {n_tensors:,} tensors and {n_fields:,} metadata values")
        fields: dict[str, Any] = {}
        for _ in range(n_fields):
            key = self.name("metadata")
            if key in fields:
                raise DamageError(f"it has the metadata value {key} twice")
            fields[key] = self.value(key, self.number("I"))
        table = [self.tensor() for _ in range(n_tensors)]
        if len({t[0] for t in table}) != len(table):
            raise DamageError("it has two tensors of the same name")
        alignment = fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment % 8 or alignment > 1 << 20:
            raise DamageError(f"general.alignment is {alignment!r}")
        start = -(-self.at // alignment) * alignment
        return Header(version, fields, tuple(self.placed(start, alignment, *t) for t in table))

    def number(self, code: str) -> Any:
        size = struct.calcsize(f"<{code}")
        if self.at + size > self.length:
            raise DamageError("it ends in its header: half a download")
        found = struct.unpack_from(f"<{code}", self.data, self.at)[0]
        self.at += size
        return found

    def raw(self) -> bytes:
        n = self.number("Q")
        if n > self.length - self.at:
            raise DamageError(f"a text at byte {self.at:,} should have {n:,} bytes")
        self.at += n
        return self.data[self.at - n : self.at]

    def name(self, what: str) -> str:
        raw = self.raw()
        try:
            if 0 < len(raw) <= MOST_NAME and 0 not in raw:
                return raw.decode()
        except UnicodeDecodeError:
            pass
        raise DamageError(f"a name of {what} at byte {self.at - len(raw):,} is no name: {raw[:40]!r}")

    def value(self, key: str, kind: int) -> Any:
        if kind == STRING:
            return self.raw().decode(errors="replace")
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind != ARRAY:
            raise DamageError(f"the metadata value {key} has the type {kind}, which GGUF does not have")
        inner, count = self.number("I"), self.number("Q")
        if inner == STRING:
            if count * 8 > self.length - self.at:
                raise DamageError(f"the list {key} should have {count:,} texts")
            for _ in range(count):
                self.raw()
            return Array(inner, count)
        if inner not in SCALARS:
            raise DamageError(f"the list {key} has elements of the type {inner}")
        size = count * struct.calcsize(f"<{SCALARS[inner]}")
        if size > self.length - self.at:
            raise DamageError(f"the list {key} should have {count:,} numbers")
        values = struct.unpack_from(f"<{count}{SCALARS[inner]}", self.data, self.at) if count <= KEPT else ()
        self.at += size
        return Array(inner, count, values)

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, shape, type, offset)"""
        name = self.name("a tensor")
        dims = self.number("I")
        if not 1 <= dims <= MOST_DIMS:
            raise DamageError(f"the tensor {name} has {dims} dimensions")
        return name, tuple(self.number("Q") for _ in range(dims)), self.number("I"), self.number("Q")

    def placed(self, start: int, alignment: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> Entry:
        if kind not in TYPES:
            raise DamageError(f"the tensor {name} has the type {kind}, which llmc does not know")
        block, size = TYPES[kind]
        if 0 in shape or shape[0] % block:
            raise DamageError(f"the tensor {name} has the shape {list(shape)}, and its type has blocks of {block} weights")
        nbytes = math.prod(shape) // block * size
        if offset % alignment or start + offset + nbytes > self.length:
            raise DamageError(f"the tensor {name} should end at byte {start + offset + nbytes:,}, and the file has "
                          f"{self.length:,}")
        return Entry(name, shape, kind, start + offset, nbytes)
