"""The hidden states of the calibration sequences, in files: memory is bounded, and `--resume` can read them again.

There are three files in rotation. A layer reads one file and writes the next one. The file that it reads is still being
synced to the disk. The third file is durable: a killed run continues from it. Plain reads and writes leave the bytes in the
page cache, so with enough free memory this runs at memory speed and takes no resident memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from threading import Lock

import numpy as np
import torch

from llmc.compress.rows import Carried, checksum
from llmc.files import fsync


class StateStore:
    """float32 hidden states of one stream of sequences. count: of its sequences.  shape: of the states of one of them,
    [seq_len, hidden]; a model may have more axes.  axis: of the sequences in the states that a layer takes.
    carried: what earlier layers made for the present and later ones beside the states."""

    def __init__(self, folder: Path, name: str, count: int, shape: tuple[int, ...], batch: int, axis: int = 0) -> None:
        self.name, self.files = name, [folder / f"{name}.{side}.f32" for side in "abc"]
        self.count, self.shape, self.batch, self.axis, self.side = count, shape, batch, axis, 0
        self.row = math.prod(shape) * 4  # bytes of one sequence
        self.carried = Carried(folder, f"{name}.carried", count)

    def starts(self) -> Iterator[tuple[int, int]]:
        """(first sequence, last sequence + 1) of each batch."""
        return batches_of(self.count, self.batch)

    def read(self, first: int, last: int) -> torch.Tensor:
        """The input states of the present layer for the sequences `first` … `last - 1`, float32 [n, seq_len, hidden]."""
        count = (last - first) * self.row // 4
        flat = np.fromfile(self.files[self.side], dtype=np.float32, count=count, offset=first * self.row)
        return torch.from_numpy(flat).view(last - first, *self.shape).movedim(0, self.axis)

    def rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """The input states [n, hidden] of single tokens, numbered over all sequences."""
        length, hidden = self.shape
        flat = np.memmap(self.files[self.side], np.float32, "r", shape=(self.count * length, hidden))
        return torch.from_numpy(np.asarray(flat[tokens.numpy()]))

    def replace(self, batches: Iterable[torch.Tensor]) -> None:
        """Write the layer's output, batch by batch in order, to the next file. It is durable after `settle`."""
        self.clear()
        for (first, _), states in zip(self.starts(), batches, strict=True):
            self.write(first, states)

    def clear(self) -> None:
        """Create the next file for `write`. A link or a pipe in its place is removed: a run never writes through one."""
        if self._following.is_symlink() or self._following.is_fifo():
            self._following.unlink()
        with self._following.open("wb") as f:
            f.truncate(self.count * self.row)

    def write(self, first: int, states: torch.Tensor) -> None:
        """Write the layer's output for the sequences from `first` on to the next file. Several threads may call it."""
        with self._following.open("r+b") as f:
            f.seek(first * self.row)
            f.write(states.to("cpu", torch.float32).movedim(self.axis, 0).contiguous().numpy().view(np.uint8).data)

    def advance(self) -> None:
        """Make the written file the input of the next layer."""
        self.side = (self.side + 1) % len(self.files)

    def settle(self, side: int) -> int:
        """Sync the file `side` to the disk. Returns its CRC-32. It may run in parallel with the next layer."""
        fsync(self.files[side])
        return checksum(self.files[side])

    def restore(self, side: int, expected: int) -> bool:
        """Continue from the file `side` of an interrupted run. Returns False if its size or its CRC-32 is not as expected."""
        self.side = side
        path = self.files[side]
        if not path.is_file() or path.stat().st_size != self.count * self.row:
            return False
        return checksum(path) == expected

    @property
    def _following(self) -> Path:
        return self.files[(self.side + 1) % len(self.files)]


def batches_of(count: int, batch: int) -> Iterator[tuple[int, int]]:
    """(first sequence, last sequence + 1) of each batch of `count` sequences."""
    for first in range(0, count, batch):
        yield first, min(first + batch, count)


class Scratch:
    """The input of one linear for every batch, in a file that exists while its layer is processed.

    dtype: bf16 if matrix products round their factors to bf16 (then nothing is lost), else float32.
    """

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        self.path, self.dtype = path, dtype
        self.places: dict[int, tuple[int, tuple[int, ...]]] = {}  # batch -> (byte offset, shape)
        self.end = 0
        self.lock = Lock()
        path.write_bytes(b"")

    def put(self, key: int, value: torch.Tensor) -> None:
        """Store the input [n, seq_len, in] of batch `key`. Several threads may call it."""
        raw = value.to("cpu", self.dtype).contiguous().view(torch.uint8).numpy()
        with self.lock:
            place, self.end = self.end, self.end + raw.nbytes
        with self.path.open("r+b") as f:
            f.seek(place)
            f.write(raw.data)
        self.places[key] = (place, tuple(value.shape))

    def get(self, key: int) -> torch.Tensor:
        """The stored input of batch `key`, in `dtype`."""
        offset, shape = self.places[key]
        count = math.prod(shape) * self.dtype.itemsize
        raw = torch.from_numpy(np.fromfile(self.path, dtype=np.uint8, count=count, offset=offset))
        return raw.view(self.dtype).view(shape)

    def close(self) -> None:
        self.path.unlink(missing_ok=True)
