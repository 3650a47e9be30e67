"""Writes a safetensors checkpoint from byte ranges of other files, unchanged and in constant memory.

The format (huggingface/safetensors, "Format"): 8 bytes little-endian header length, a JSON header that gives each
tensor's type, shape and byte range, then the bytes.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llmc.formats.checkpoint import INDEX, SINGLE, Checkpoint, read_header

MAX_SHARD = 4_000_000_000
COPY = 1 << 22


@dataclass(frozen=True)
class Piece:
    """One tensor inside a safetensors file. offset: position of its first byte in the file."""

    name: str
    dtype: str
    shape: list[int]
    file: Path
    offset: int
    nbytes: int

    def blocks(self) -> Iterator[bytes]:
        """The bytes of the tensor, COPY at a time."""
        with self.file.open("rb") as f:
            f.seek(self.offset)
            left = self.nbytes
            while left:
                block = f.read(min(COPY, left))
                if not block:
                    raise EOFError(f"{self.file} ends inside {self.name}")
                yield block
                left -= len(block)


@dataclass(frozen=True)
class Made(Piece):
    """A tensor that no file holds as it is written: the values of codes (llmc.formats.decoded). file, offset: of the codes.
    source: its name in the checkpoint."""

    checkpoint: Checkpoint
    source: str

    def blocks(self) -> Iterator[bytes]:
        import torch

        yield self.checkpoint.tensor(self.source).contiguous().view(torch.uint8).numpy().tobytes()


def pieces_of(file: Path, names: Iterable[str] | None = None) -> list[Piece]:
    """The tensors of a safetensors file (all, or those named), in the order of their bytes."""
    header = read_header(file)
    with file.open("rb") as f:
        start = 8 + struct.unpack("<Q", f.read(8))[0]
    wanted = None if names is None else set(names)
    found = []
    for name, t in header.items():
        if name != "__metadata__" and (wanted is None or name in wanted):
            first, last = t["data_offsets"]
            found.append(Piece(name, t["dtype"], t["shape"], file, start + first, last - first))
    return sorted(found, key=lambda p: p.offset)


def rest_of(checkpoint: Checkpoint, replaced: Container[str]) -> list[Piece]:
    """The tensors of a checkpoint, unchanged, without those in `replaced`. Decoded tensors are written as their values."""
    made = {coded.parts[0]: name for name, coded in checkpoint.decoded.tensors.items()}
    parts, found = checkpoint.decoded.parts(), list[Piece]()
    for p in (p for file in checkpoint.files for p in pieces_of(file) if checkpoint.shard_of[p.name] == file):
        if name := made.get(p.name):
            coded = checkpoint.decoded.tensors[name]
            nbytes = math.prod(coded.shape) * _width(coded.dtype)
            p = Made(name, coded.dtype, list(coded.shape), p.file, p.offset, nbytes, checkpoint, name)
        elif p.name in parts:
            continue
        if p.name not in replaced:
            found.append(p)
    return found


def write_checkpoint(folder: Path, pieces: list[Piece], max_shard: int = MAX_SHARD) -> None:
    """`model.safetensors`, or numbered shards of at most `max_shard` bytes (or one tensor) with their index."""
    shards: list[list[Piece]] = [[]]
    filled = 0
    for piece in pieces:
        if shards[-1] and filled + piece.nbytes > max_shard:
            shards.append([])
            filled = 0
        shards[-1].append(piece)
        filled += piece.nbytes
    if len(shards) == 1:
        _write(folder / SINGLE, pieces)
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        _write(folder / name, shard)
        weight_map |= {p.name: name for p in shard}
    index = {"metadata": {"total_size": sum(p.nbytes for p in pieces)}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write(path: Path, pieces: list[Piece]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    # widest types first: every tensor is then aligned to its type, as readers that map the file need
    pieces = sorted(pieces, key=lambda p: (-_width(p.dtype), p.name))
    offset = 0
    for p in pieces:
        header[p.name] = {"dtype": p.dtype, "shape": p.shape, "data_offsets": [offset, offset + p.nbytes]}
        offset += p.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(raw)) + raw)
        for p in pieces:
            out.writelines(p.blocks())


def _width(dtype: str) -> int:
    """Bytes of one element: F32 4, BF16 2, I32 4, U8 1, F8_E4M3 1, BOOL 1."""
    digits = "".join(c for c in dtype.split("_")[0] if c.isdigit())
    return int(digits) // 8 if digits else 1
