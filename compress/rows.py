"""What decoder layers are given beside the hidden states, sequence by sequence, in files.

It is of two kinds: what the model makes of the text before its first layer (`given`), and what one layer makes for later ones
(`Carried`). Like the hidden states it is read batch by batch: memory is bounded, and `--resume` reads it again. A key is
written by one layer and never changed, so there is one file for each key and no rotation.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch

from llmc.files import fsync


@dataclass
class Stored:
    """The tensor of a key. dtype: without 'torch.'.  shape: of one sequence.  made: the layer that makes it; -1 if the model
    makes it before its first layer.  until: the last layer that may read it.  crc: of the file, once it is whole."""

    dtype: str
    shape: tuple[int, ...]
    made: int
    until: int
    crc: int | None = None

    @property
    def row(self) -> int:
        """Bytes of one sequence."""
        return math.prod(self.shape) * self.type.itemsize

    @property
    def type(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found


class Rows:
    """Tensors [count, ...] by key. A key's file is `folder / NAME.KEY.bin`."""

    def __init__(self, folder: Path, name: str, count: int) -> None:
        self.folder, self.name, self.count = folder, name, count
        self.stored: dict[str, Stored] = {}
        self.lock = Lock()

    def write(self, key: str, first: int, value: torch.Tensor, made: int, until: int) -> None:
        """Store `value` [n, ...] of the sequences from `first` on. Several threads may call it."""
        value = value.detach().cpu().contiguous()
        wanted = Stored(str(value.dtype).removeprefix("torch."), tuple(value.shape[1:]), made, until)
        with self.lock:
            found = self.stored.get(key)
            if found is None:
                found = self.stored[key] = wanted
                with self._file(key).open("wb") as f:
                    f.truncate(self.count * found.row)
        if (found.dtype, found.shape) != (wanted.dtype, wanted.shape):
            raise RuntimeError(f"{key}: a sequence of {wanted.dtype} {list(wanted.shape)} after one of {found.dtype} "
                               f"{list(found.shape)}")
        with self._file(key).open("r+b") as f:
            f.seek(first * found.row)
            f.write(value.view(-1).view(torch.uint8).numpy().data)

    def read(self, key: str, first: int, last: int) -> torch.Tensor:
        """The tensor [n, ...] of the sequences `first` … `last - 1`."""
        found = self.stored[key]
        raw = np.fromfile(self._file(key), dtype=np.uint8, count=(last - first) * found.row, offset=first * found.row)
        return torch.from_numpy(raw).view(found.type).view(last - first, *found.shape)

    def settle(self, done: int) -> dict[str, Any]:
        """Sync what the layers from `done` on may read and earlier ones made. Returns its description for `restore`."""
        with self.lock:
            needed = {k: s for k, s in self.stored.items() if s.made < done <= s.until}
        for key, stored in needed.items():
            if stored.crc is None:
                fsync(self._file(key))
                stored.crc = checksum(self._file(key))
        return {key: asdict(stored) for key, stored in needed.items()}

    def forget(self, done: int) -> None:
        """Remove what no layer from `done` on reads."""
        with self.lock:
            old = [k for k, s in self.stored.items() if s.until < done]
            for key in old:
                del self.stored[key]
        for key in old:
            self._file(key).unlink(missing_ok=True)

    def restore(self, found: dict[str, Any]) -> bool:
        """Continue an interrupted run. Returns False if a file's size or CRC-32 is not as expected."""
        self.stored = {key: Stored(**{**values, "shape": tuple(values["shape"])}) for key, values in found.items()}
        return all(self._file(key).is_file() and self._file(key).stat().st_size == self.count * stored.row
                   and checksum(self._file(key)) == stored.crc for key, stored in self.stored.items())

    def _file(self, key: str) -> Path:
        return self.folder / f"{self.name}.{key}.bin"


class Carried(Rows):
    """What layers make for later layers, of one stream of sequences: members of what they return, and the contents of
    containers (dicts, lists) that several layers are given.

    versions: {number of a container: {layer: its content after that layer}}. A content is a list of [key, tree]; see `Tree`
    in arguments.py.
    """

    def __init__(self, folder: Path, name: str, count: int) -> None:
        super().__init__(folder, name, count)
        self.versions: dict[int, dict[int, list[Any]]] = {}

    def content(self, number: int, layer: int) -> list[Any] | None:
        """The content of a container when `layer` begins; None if no earlier layer changed it."""
        versions = self.versions.get(number, {})
        before = [made for made in versions if made < layer]
        return versions[max(before)] if before else None

    def note(self, number: int, layer: int, content: list[Any]) -> None:
        """Set the content of a container after `layer`. It is the same for every batch."""
        with self.lock:
            found = self.versions.setdefault(number, {}).setdefault(layer, content)
        if found != content:
            raise RuntimeError(f"layer {layer} leaves {content} in a shared container after {found}")

    def settle(self, done: int) -> dict[str, Any]:
        rows = super().settle(done)
        with self.lock:
            versions = [[number, made, content] for number, by_layer in self.versions.items()
                        for made, content in by_layer.items() if made < done]
        return {"rows": rows, "versions": versions}

    def restore(self, found: dict[str, Any]) -> bool:
        for number, made, content in found["versions"]:
            self.versions.setdefault(number, {})[made] = content
        return super().restore(found["rows"])


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    found = 0
    with path.open("rb") as f:
        while block := f.read(1 << 24):
            found = zlib.crc32(block, found)
    return found
