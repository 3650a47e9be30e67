"""Which tensor of the converter's float file holds the codes of which quantized linears: by whole rows, else by blocks.

    rows      the converter permuted, fused, split or stacked whole rows: their codes are gathered
    blocks    it moved columns too, and the blocks of the type stayed whole: the codes are gathered by blocks
    neither   it transposed the matrix, or changed its values: the tensor gets 8 bits
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor

from llmc.console import progress
from llmc.errors import UserError
from llmc.export.gguf import blocks
from llmc.export.gguf.blocks import Kind
from llmc.export.gguf.matching import Index, digests, evidence
from llmc.formats import quantized
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.quantized import Quantized
from llmc.formats.types import BLOCK_TYPES


@dataclass(frozen=True)
class Found:
    """The origin of a tensor. pieces: (number of the linear, number of its row or block), int64 [n, 2]. width: weights of a
    piece; None: a whole row."""

    pieces: np.ndarray
    width: int | None = None


@dataclass
class Carried:
    """linears: all quantized linears. found: the origin of the tensors with codes. rounded: the tensors of linears without an
    origin. lost: these linears. by_blocks: linears whose rows are no rows of the file."""

    linears: list[str]
    found: dict[str, Found] = field(default_factory=dict)
    rounded: set[str] = field(default_factory=set)
    lost: list[str] = field(default_factory=list)
    by_blocks: list[str] = field(default_factory=list)


def carry(ckpt: Checkpoint, reader: GGUFReader, exact: set[str]) -> Carried:
    """Search the float file for the rows of quantized linears. exact: tensors that llama.cpp needs in float32; they get no
    codes. Raises UserError if linears are not in the file, or of types that one tensor cannot have together."""
    done = Carried(quantized.linears(ckpt))
    if not done.linears:
        return done
    search = _Search(ckpt, done.linears)
    rest = []
    for t in matrices(reader):
        if (pieces := search.rows(t)) is None:
            rest.append(t)
        elif t.name not in exact:
            done.found[t.name] = Found(pieces)
    rest = [t for t in rest if t.name not in exact]
    if left := search.left():
        rest = [t for t in rest if not search.is_float(t)]
        done.by_blocks, done.lost = search.blocks(left, rest, done.found)
        done.rounded = {t.name for t in rest if t.name not in done.found}
    if done.lost and not done.rounded:
        raise UserError(f"{len(done.lost)} quantized linears (first {done.lost[0]}) are not in the file of llama.cpp's "
                        "converter: it left them out", "llmc cannot write the codes of this architecture into GGUF")
    return done


def matrices(reader: GGUFReader) -> Iterator[ReaderTensor]:
    """The float32 tensors of two or more axes."""
    return (t for t in reader.tensors if t.tensor_type == Kind.F32 and len(t.shape) > 1)


def values(t: ReaderTensor, width: int | None = None) -> np.ndarray:
    """float32 [n, width] of a tensor; width: None is a whole row."""
    return np.asarray(t.data).reshape(-1, width or int(t.shape[0]))


class _Search:
    """Indexes of the checkpoint's rows: {(type, width): rows of its linears}. `None` is the type of float matrices."""

    def __init__(self, ckpt: Checkpoint, linears: list[str]) -> None:
        self.ckpt, self.linears = ckpt, linears
        self.types = [quantized.type_name(ckpt, linear) for linear in linears]
        self.indexes: dict[tuple[str, int], Index] = {}
        self.floats: dict[int, Index] | None = None
        with progress("indexing linear", len(linears)) as p:
            for i, linear in enumerate(linears):
                rows = self._values(i)
                self.indexes.setdefault((self.types[i], rows.shape[1]), Index()).add(i, digests(rows))
                p.step(linear)

    def _values(self, i: int) -> np.ndarray:
        return np.asarray(quantized.read(self.ckpt, self.linears[i]).dequantize().numpy())

    def rows(self, t: ReaderTensor) -> np.ndarray | None:
        """The linear and row of each row of a tensor; None if not all are known. Raises UserError for mixed types."""
        data = values(t)
        fitting = {name: index for (name, width), index in self.indexes.items() if width == data.shape[1]}
        if not fitting:
            return None
        keys = digests(data)
        found = {name: index.find(keys) for name, index in fitting.items()}
        known = {name: pieces[:, 0] >= 0 for name, pieces in found.items()}
        for name in sorted(found):
            if evidence(data, known[name]) == "all":
                fitting[name].place(found[name])
                return found[name]
        if evidence(data, np.logical_or.reduce(list(known.values()))) == "all":
            names = ", ".join(sorted(name for name in found if evidence(data, known[name]) != "none"))
            raise UserError(f"{t.name} consists of linears of different types ({names}), and a tensor has one type",
                            "give these linears the same type when you quantize")
        return None

    def left(self) -> list[int]:
        """The linears with rows that are in no tensor."""
        return sorted(i for index in self.indexes.values() for i in index.left())

    def is_float(self, t: ReaderTensor) -> bool:
        """Whether all rows of a tensor are rows of float matrices."""
        if self.floats is None:
            self.floats = {}
            packed = {name for linear in self.linears for name in quantized.parts(linear)}
            for i, name in enumerate(self.ckpt.names()):
                shape = self.ckpt.shape(name)
                if name not in packed and len(shape) > 1:
                    rows = self.ckpt.tensor(name).to(torch.float32).reshape(-1, shape[-1]).numpy()
                    self.floats.setdefault(shape[-1], Index()).add(i, digests(rows))
        data = values(t)
        index = self.floats.get(data.shape[1])
        return index is not None and evidence(data, index.find(digests(data))[:, 0] >= 0) == "all"

    def blocks(self, left: list[int], rest: list[ReaderTensor], found: dict[str, Found]) -> tuple[list[str], list[str]]:
        """Search `rest` for blocks of the linears `left`, and add what is found to `found`. Returns the linears that are
        found by blocks, and those that have blocks or rows which are in no tensor."""
        indexes: dict[tuple[str, int], Index] = {}
        for i in left:
            kind = blocks.kind_of_type(quantized.type_of(self.ckpt, self.linears[i]))
            width = BLOCK_TYPES[kind.name.lower()].block
            indexes.setdefault((self.types[i], width), Index()).add(i, digests(self._values(i).reshape(-1, width)))
        for t in rest:
            for (_, width), index in indexes.items():
                if int(t.shape[0]) % width:
                    continue
                data = values(t, width)
                pieces = index.find(digests(data))
                if evidence(data, pieces[:, 0] >= 0) == "all":
                    index.place(pieces)
                    found[t.name] = Found(pieces, width)
                    break
        placed = {i for f in found.values() if f.width for i in np.unique(f.pieces[:, 0]).tolist()}
        rows = {i: r for index in self.indexes.values() for i, r in index.left().items()}
        missing = {i: b // (quantized.shape(self.ckpt, self.linears[i])[1] // width)
                   for (_, width), index in indexes.items() for i, b in index.left().items()}
        lost = [i for i in left if np.isin(rows[i], missing.get(i, [])).any()]
        return [self.linears[i] for i in sorted(placed)], [self.linears[i] for i in lost]


def gather(ckpt: Checkpoint, linears: list[str], f: Found, rows: int) -> Quantized:
    """The codes of a tensor of `rows` rows, from the linears that it is made of."""
    gathered: dict[str, torch.Tensor] = {}
    for i in np.unique(f.pieces[:, 0]):
        mine = f.pieces[:, 0] == i
        here, there = torch.from_numpy(np.flatnonzero(mine)), torch.from_numpy(f.pieces[mine, 1])
        q = quantized.read(ckpt, linears[i])
        if f.width is not None:
            q = quantized.as_blocks(q)
        for part, t in quantized.tensors_of(q).items():
            cut = t if f.width is None else t.reshape(q.shape[0] * q.shape[1] // f.width, -1)
            gathered.setdefault(part, cut.new_empty(len(f.pieces), cut.shape[1]))[here] = cut[there]
    return quantized.with_tensors(q, {part: t.reshape(rows, -1) for part, t in gathered.items()})
