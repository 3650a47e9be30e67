"""The model without weights that the builder reads, with row numbers in place of its matrices.

The builder joins, cuts and transposes matrices as the architecture needs it, so names do not tell which rows a node holds.
Therefore llmc gives the builder a model with row numbers as the values of its matrices (in float64, which real weights never
have). From the numbers in a node, llmc reads its pieces.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from llmc.errors import UserError
from llmc.export.onnx.weights import Piece
from llmc.export.parity import PLEASE_REPORT
from llmc.formats import quantized
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.contents import is_buffer
from llmc.formats.ends import ends_of
from llmc.formats.hf import empty_model
from llmc.formats.names import Names, missing


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
                raise UserError(f"onnxruntime-genai's model builder has no place for {module} in its graph", PLEASE_REPORT)


@dataclass(frozen=True)
class Ends:
    """The ends of the model: module names of embedding and head in the checkpoint, the same if they are one matrix.

    spare: a head tensor that is a copy of the embedding."""

    embedding: str
    head: str
    spare: str | None = None


def skeleton(ckpt: Checkpoint, hf: Any) -> tuple[nn.Module, Rows, Ends]:
    """The model with row numbers as matrices and real values else; the row numbers; the names of embedding and head."""
    model = empty_model(hf)
    names = Names.of(ckpt, model, quantized.linears(ckpt))
    ends = _find_ends(ckpt, model, names)
    rows, numbered, used = Rows(), dict[str, nn.Parameter](), {ends.spare}
    for name, p in list(model.named_parameters(remove_duplicate=False)):
        owner = model.get_submodule(name.rpartition(".")[0])
        is_head = owner is model.get_output_embeddings() and name.endswith(".weight")
        found = names.locate(f"{ends.head}.weight" if is_head else name)
        if found is None:
            raise missing(ckpt.folder, name)
        stored, is_codes = found.name, found.is_codes
        used.update(quantized.parts(stored) if is_codes else [stored])
        shape = quantized.shape(ckpt, stored) if is_codes else ckpt.shape(stored)
        if tuple(shape) != tuple(p.shape):
            raise UserError(f"{stored} has shape {list(shape)}, config.json says {list(p.shape)}",
                            "the checkpoint and its config.json do not belong together")
        if p.ndim == 2:
            module = stored if is_codes else stored.removesuffix(".weight")
            if module not in numbered:
                numbered[module] = rows.numbered(module, p.shape)
            value = numbered[module]
        elif p.ndim == 1 or isinstance(owner, nn.Conv1d):
            value = nn.Parameter(ckpt.tensor(stored).to(torch.float32), requires_grad=False)
        else:
            raise UserError(f"{name} has {p.ndim} axes: no ONNX graph is known for such models", "export it as GGUF")
        setattr(owner, name.rpartition(".")[2], value)
    for name, buffer in list(model.named_buffers()):  # some hold weights (the bias of a router)
        if (stored_buffer := names.find(name)) and not is_buffer(name, tuple(buffer.shape)):
            used.add(stored_buffer)
            buffer.data = ckpt.tensor(stored_buffer).to(torch.float32)
    _refuse_leftovers(ckpt, used)
    return model.eval(), rows, ends


def _find_ends(ckpt: Checkpoint, model: Any, names: Names) -> Ends:
    """Find embedding and head. The tensors decide whether they are tied; raises UserError if config.json contradicts them."""
    found, embedding = ends_of(ckpt, model, names)
    one = embedding.name.removesuffix(".weight")
    if found.head is None:
        return Ends(one, one)
    return Ends(one, one, found.head) if found.one else Ends(one, found.head.removesuffix(".weight"))


def _refuse_leftovers(ckpt: Checkpoint, used: set[str | None]) -> None:
    """Raise UserError for a tensor that the model does not use. Buffers and AutoGPTQ's zero biases may be left over."""
    for name in ckpt.names():
        if name not in used and not is_buffer(name, ckpt.shape(name)) and not (
                name.endswith(".bias") and not bool(ckpt.tensor(name).any())):
            raise UserError(f"{name} of {ckpt.folder} has no place in the model that its config.json names",
                            "the checkpoint holds tensors that its architecture does not have")


