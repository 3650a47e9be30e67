"""The model without weights that the builder reads, with row numbers in place of its matrices.

The builder joins, cuts and transposes matrices as the architecture needs it, so names do not tell which rows a node holds.
Therefore llmc gives the builder a model with row numbers as the values of its matrices (in float64, which real weights never
have). From the numbers in a node, llmc reads its pieces.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from llmc.errors import UserError
from llmc.export.onnx.weights import Piece, Source
from llmc.export.parity import PLEASE_REPORT
from llmc.formats import quantized
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.contents import is_buffer
from llmc.formats.ends import ends_of
from llmc.formats.hf import empty_model
from llmc.formats.linears import around, find_layers
from llmc.formats.mixture import is_fused
from llmc.formats.names import Names, missing


@dataclass(frozen=True)
class Stack:
    """The matrices of all experts of a layer as one matrix: the rows of `pieces` in another order, `experts` times as many as
    one expert has. order: int64, the row of the joined pieces that each row is."""

    experts: int
    pieces: list[Piece]
    order: np.ndarray


class Rows:
    """Gives numbers to the rows of all matrices, and finds the pieces that a node holds."""

    def __init__(self) -> None:
        self.modules: list[str] = []
        self.starts = [0]  # the first row number of each matrix, and of the next one
        self.placed: dict[str, list[tuple[int, int]]] = {}

    def numbered(self, module: str, shape: torch.Size) -> nn.Parameter:
        """A matrix float64 [N, K] whose row i has its row number in every column. It takes the memory of one column."""
        start = self.starts[-1]
        numbers = torch.arange(start, start + shape[0], dtype=torch.float64)
        self.modules.append(module)
        self.starts.append(start + shape[0])
        return nn.Parameter(numbers[:, None].expand(*shape), requires_grad=False)

    def stacked(self, modules: list[str], shape: torch.Size, transposed: bool) -> nn.Parameter:
        """The matrices of all experts, in order of equal parts of the modules: float64 [experts, N, 2], or [experts, 2, N].
        Nobody reads the number of columns, and the builder copies these numbers."""
        experts, rows = shape[0], shape[2 if transposed else 1]
        each = experts * rows // len(modules)
        first = self.starts[-1]
        for module in modules:
            self.modules.append(module)
            self.starts.append(self.starts[-1] + each)
        numbers = torch.arange(first, self.starts[-1], dtype=torch.float64).view(experts, rows, 1).expand(experts, rows, 2)
        return nn.Parameter(numbers.transpose(1, 2) if transposed else numbers, requires_grad=False)

    def stack(self, w: torch.Tensor) -> Stack:
        """What a node's matrices of experts w [experts, N, 2] hold."""
        flat = w.reshape(-1, w.shape[-1])
        first = flat[:, 0].min()
        order = (flat[:, 0] - first).long()
        if not torch.equal(order.sort().values, torch.arange(len(order))):
            raise UserError("the model builder has changed which rows the experts of a layer have", PLEASE_REPORT)
        ordered = torch.empty_like(flat)
        ordered[order] = flat
        return Stack(w.shape[0], self.pieces(ordered), order.numpy())

    def pieces(self, w: torch.Tensor) -> list[Piece]:
        """The pieces of a node's matrix w [N, K], in order. A piece is a range of rows of one matrix."""
        if w.dtype != torch.float64 or not torch.equal(w[:, 0], w[:, -1]):
            raise UserError("the model builder has changed the columns of a matrix", PLEASE_REPORT)
        numbers = w[:, 0].long()
        cuts = [0, *((numbers.diff() != 1).nonzero()[:, 0] + 1).tolist(), len(numbers)]
        found: list[Piece] = []
        for a, b in pairwise(cuts):
            number, end = int(numbers[a]), int(numbers[b - 1]) + 1
            while number < end:  # a range of numbers may cross from one matrix into the next
                i = bisect_right(self.starts, number) - 1
                stop = min(end, self.starts[i + 1])
                found.append(Piece(self.modules[i], number - self.starts[i], stop - self.starts[i]))
                number = stop
        return found

    def place(self, pieces: list[Piece]) -> None:
        for p in pieces:
            self.placed.setdefault(p.module, []).append((p.start, p.stop))

    def check_complete(self) -> None:
        """Raise UserError unless every row of every matrix is in the graph. Gemma 4's keys, which are values too, are in it
        twice."""
        for module, (start, end) in zip(self.modules, pairwise(self.starts), strict=True):
            at = 0
            for first, stop in sorted(set(self.placed.get(module, []))):
                at = stop if first == at else -1
            if at != end - start:
                raise UserError(f"onnxruntime-genai's model builder has no place for {module} in its graph",
                                "export it as GGUF (--format gguf), or evaluate the folder itself")


@dataclass(frozen=True)
class Ends:
    """The ends of the model: module names of embedding and head in the checkpoint, the same if they are one matrix.

    spare: a head tensor that is a copy of the embedding."""

    embedding: str
    head: str
    spare: str | None = None


class Skeleton:
    """A model with row numbers as matrices, and with real values else.

    model: in eval mode.  layers, decoder_layers: the name of the list of its decoder layers, and the list.
    rows: the row numbers.  ends: names of embedding and head.
    sources: the float matrices, by the names that Names.stored gives them."""

    def __init__(self, ckpt: Checkpoint, hf: Any) -> None:
        self.ckpt, self.model = ckpt, empty_model(hf)
        self.names = Names.of(ckpt, self.model, quantized.linears(ckpt))
        self.ends = _find_ends(ckpt, self.model, self.names)
        self.rows, self.sources = Rows(), dict[str, Source]()
        self._numbered: dict[str, nn.Parameter] = {}
        prefix, layers = find_layers(self.model)
        self.layers, self.decoder_layers = prefix, layers
        for name, module in (*around(self.model, prefix), *((f"{prefix}.{n}", m) for n, m in layers.named_modules())):
            self._fill(name, module)
        if hf.get_text_config() is hf:
            self._refuse_leftovers()

    @property
    def rotary(self) -> Any:
        """The rotary embedding of the decoder; None if it has none."""
        decoder = self.model.get_submodule(self.layers.rpartition(".")[0])
        return next((m for m in decoder.children() if type(m).__name__.endswith("RotaryEmbedding")), None)

    def _fill(self, path: str, module: nn.Module) -> None:
        """Give a module its parameters and those buffers that are stored (the bias of a router)."""
        is_head, head = module is self.model.get_output_embeddings(), f"{self.ends.head}.weight"
        for name, p in list(module.named_parameters(recurse=False)):
            full = f"{path}.{name}"
            if is_fused(module) and p.ndim == 3:
                value = self._experts(path, name, module, p)
            elif p.ndim == 2 and not is_fused(module):  # those of experts are biases
                value = self._matrix(self.names.find_own(head) or head if is_head else full, p)
            else:
                value = nn.Parameter(self._read(full, p).to(torch.float32), requires_grad=False)
            setattr(module, name, value)
        for name, buffer in list(module.named_buffers(recurse=False)):
            if (stored := self.names.find(f"{path}.{name}")) and not is_buffer(stored, tuple(buffer.shape)):
                module._buffers[name] = self._read(f"{path}.{name}", buffer).to(torch.float32)

    def _matrix(self, parameter: str, p: torch.Tensor) -> nn.Parameter:
        module = self._source(parameter, (p.shape[0], p.shape[1]))
        if module not in self._numbered:
            self._numbered[module] = self.rows.numbered(module, p.shape)
        return self._numbered[module]

    def _experts(self, path: str, name: str, fused: Any, p: torch.Tensor) -> nn.Parameter:
        """The stacked matrices of one kind of all experts."""
        leaves = self.names.leaves(f"{path}.{name}")
        rows, columns = p.shape[1:][:: -1 if fused.is_transposed else 1]
        modules = [self._source(f"{path}.{number}.{leaf}.weight", (rows // len(leaves), columns), expert=True,
                                transposed=fused.is_transposed) for number in range(p.shape[0]) for leaf in leaves]
        return self.rows.stacked(modules, p.shape, fused.is_transposed)

    def _source(self, parameter: str, shape: tuple[int, int], expert: bool = False, transposed: bool = False) -> str:
        """Note where a matrix comes from; return the name of its module."""
        place = self.names.locate(parameter)
        if place is None:
            raise missing(self.ckpt.folder, parameter)
        if place.is_codes:
            _check_shape(place.name, quantized.shape(self.ckpt, place.name), shape)
            return place.name
        module = self.names.stored(parameter).removesuffix(".weight")
        turned = transposed and place.expert is not None

        def read() -> torch.Tensor:
            value = self._read(parameter, None)
            return value.t() if turned else value

        if place.expert is None:
            _check_shape(place.name, self.ckpt.shape(place.name), shape)
        self.sources[module] = Source(shape, read, expert)
        return module

    def _read(self, parameter: str, like: torch.Tensor | None) -> torch.Tensor:
        """The stored values of a float parameter, in the shape of `like` if that is given."""
        value, place = self.names.read(parameter), self.names.locate(parameter)
        if value is None or place is None:
            raise missing(self.ckpt.folder, parameter)
        if like is not None:
            _check_shape(place.name, value.shape, like.shape)
        return value

    def _refuse_leftovers(self) -> None:
        """Raise UserError for a tensor that the model does not use. Buffers and AutoGPTQ's zero biases may be left over, and
        what transformers leaves out by itself (Qwen 3.5's layers that draft tokens)."""
        codes = {part for linear in self.names.linears for part in quantized.parts(linear)}
        ignored = getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ()
        for name in self.ckpt.names():
            if any(re.search(pattern, name) for pattern in ignored):
                continue
            if name not in codes and name != self.ends.spare and self.names.find_own(name) is None and not is_buffer(
                    name, self.ckpt.shape(name)) and not (name.endswith(".bias") and not bool(self.ckpt.tensor(name).any())):
                raise UserError(f"{name} of {self.ckpt.folder} has no place in the model that its config.json names",
                                "the checkpoint holds tensors that its architecture does not have")


def _check_shape(stored: str, found: Any, expected: Any) -> None:
    if tuple(found) != tuple(expected):
        raise UserError(f"{stored} has shape {list(found)}, config.json says {list(expected)}",
                        "the checkpoint and its config.json do not belong together")


def _find_ends(ckpt: Checkpoint, model: Any, names: Names) -> Ends:
    """Find embedding and head. The tensors decide whether they are tied; raises UserError if config.json contradicts them."""
    found, embedding = ends_of(ckpt, model, names)
    one = embedding.name.removesuffix(".weight")
    if found.head is None:
        return Ends(one, one)
    return Ends(one, one, found.head) if found.one else Ends(one, found.head.removesuffix(".weight"))
