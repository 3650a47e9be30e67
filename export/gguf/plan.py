"""The plan of a GGUF file: the name, the type and the position of every tensor. It is complete before a byte is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter

from llmc.errors import UserError
from llmc.export.gguf import blocks
from llmc.export.gguf.architectures import TensorNames, interleave
from llmc.export.gguf.blocks import Kind
from llmc.export.gguf.config import GgufExportConfig
from llmc.export.gguf.tokenizer import Vocabulary
from llmc.export.gguf.writer import GgufTensor, Source
from llmc.families.row import Family
from llmc.formats import ends, quantized
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.contents import is_buffer
from llmc.formats.types import QuantizedTensor

HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Types:
    """The types of the float matrices, and the reason for the embedding's."""

    matrix: Kind
    embedding: Kind
    head: Kind
    head_given: bool
    reason: str

    @classmethod
    def choose(cls, config: GgufExportConfig, ckpt: Checkpoint) -> Types:
        """The types in `config`; else those recorded in the folder (`quantized.end_types`); else q8_0 for the embedding of a
        quantized model and --float-type for that of a float model."""
        wanted = quantized.end_types(ckpt)
        has_codes = quantized.is_quantized(ckpt)
        embedding, reason = config.embedding, "as asked"
        if embedding is None and "embedding" in wanted:
            embedding, reason = wanted["embedding"], "as the folder was made for"
        elif embedding is None:
            embedding = "q8_0" if has_codes else config.float_type
            reason = "8 bits beside a quantized decoder" if has_codes else "the same as --float-type"
        head = config.head or wanted.get("head", embedding)
        return cls(Kind[config.float_type.upper()], Kind[embedding.upper()], Kind[head.upper()], config.head is not None,
                   reason)

    def of(self, name: str, shape: tuple[int, ...]) -> Kind:
        """The type of a tensor. Vectors and position embeddings stay F32: llama.cpp adds them to float32 values."""
        if name == "token_embd.weight":
            return self.embedding
        if name == "output.weight":
            return self.head
        return Kind.F32 if len(shape) == 1 or name == "position_embd.weight" else self.matrix


@dataclass
class Plan:
    """A file that is planned but not written. `writer` holds its metadata.

    moved: quantized linears whose columns the converter moved. lost: how many have no codes in the file.
    projector: a temporary file with the vision or audio part of the model, to be published beside it."""

    writer: GGUFWriter
    entries: list[GgufTensor]
    vocabulary: Vocabulary
    context_length: int
    notes: list[str] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)
    lost: int = 0
    projector: Path | None = None


def reorder(source: Source, rows: np.ndarray) -> Source:
    """The same weights with their rows in the order `rows`."""
    index = torch.from_numpy(rows)
    return source[index] if isinstance(source, torch.Tensor) else quantized.rows_of(source, index)


class Planner:
    """Plans the file tensors of a checkpoint of one family."""

    def __init__(self, ckpt: Checkpoint, family: Family, hf: Any, types: Types) -> None:
        self.ckpt, self.family, self.hf, self.types = ckpt, family, hf, types
        self.names = TensorNames(family, hf.num_hidden_layers)
        self.linears = set(quantized.linears(ckpt))
        self.notes: list[str] = []

    def entries(self) -> list[GgufTensor]:
        found = [self._quantized(linear) for linear in self.linears]
        packed = {name for linear in self.linears for name in quantized.parts(linear)}
        zero_biases = 0
        for name in self.ckpt.names():
            if name in packed or is_buffer(name, self.ckpt.shape(name)):
                continue
            if name.endswith(".bias") and name.removesuffix(".bias") in self.linears and self._is_spare(name):
                zero_biases += 1
                continue
            found.append(self._float(name))
        if zero_biases:
            self.notes.append(f"{zero_biases} biases that are all zero were left out")
        found = self._tie(found)
        names = [e.name for e in found]
        if twice := next((n for n in names if names.count(n) > 1), None):
            raise UserError(f"two tensors of {self.ckpt.folder} map to {twice}", "the checkpoint holds a weight twice")
        self._check_mins(found)
        return sorted(found, key=lambda e: e.order)

    def _gguf_name(self, name: str) -> str:
        if mapped := self.names.find(name):
            return mapped
        raise UserError(f"{name} of {self.ckpt.folder} has no place in llama.cpp's {self.family.gguf.name} architecture",
                        "the checkpoint holds tensors that the architecture in its config.json does not have")

    def _is_spare(self, bias: str) -> bool:
        """True for an all-zero bias that AutoGPTQ added to a linear without one. GPT-2 has real biases everywhere."""
        return not self.family.transposed and not bool(self.ckpt.tensor(bias).any())

    def _rows(self, module: str, rows: int) -> np.ndarray | None:
        """The order of the rows in the file; None if it is that of the checkpoint."""
        role = self.family.role_of(module)
        if self.family.gguf.interleaved and role in ("attn_q", "attn_k"):
            heads = self.hf.num_attention_heads if role == "attn_q" else self.hf.num_key_value_heads
            if rows % (2 * heads):
                raise UserError(f"{module} has {rows} rows, which {heads} heads do not divide in pairs",
                                "the checkpoint and its config.json do not match")
            return interleave(rows, heads)
        return None

    def _quantized(self, linear: str) -> GgufTensor:
        shape = quantized.shape(self.ckpt, linear)
        kind = blocks.kind_of_type(quantized.type_of(self.ckpt, linear))
        blocks.check_rows(linear, shape, kind)
        rows = self._rows(linear, shape[0])

        def source() -> Source:
            q = quantized.read(self.ckpt, linear)
            return q if rows is None else reorder(q, rows)

        return GgufTensor(self._gguf_name(f"{linear}.weight"), shape, kind, source, codes=True)

    def _float(self, name: str) -> GgufTensor:
        module, _, what = name.rpartition(".")
        shape = self.ckpt.shape(name)
        transposed = self.family.transposed and what == "weight" and self.family.role_of(module) is not None
        if transposed:
            shape = shape[::-1]
        mapped = self._gguf_name(name)
        kind = self.types.of(mapped, shape)
        blocks.check_rows(mapped, shape, kind)
        rows = self._rows(module, shape[0])
        offset = self.family.offset if name.endswith("norm.weight") else 0.0

        def source() -> Source:
            t = self.ckpt.tensor(name)
            if transposed:
                t = t.t()
            if offset:
                t = t.to(torch.float32) + offset
            return t if rows is None else reorder(t, rows)

        return GgufTensor(mapped, shape, kind, source, stored=name)

    def _tie(self, found: list[GgufTensor]) -> list[GgufTensor]:
        """Remove a head that equals the embedding: llama.cpp then uses the embedding for both.

        Raises UserError if config.json, the checkpoint, the options and the architecture contradict each other."""
        embedding = next((e for e in found if e.name == "token_embd.weight"), None)
        if embedding is None:
            raise UserError(f"{self.ckpt.folder} has no token embedding", "download the model again")
        head = next((e for e in found if e.name == "output.weight"), None)
        says_tied = bool(getattr(self.hf, "tie_word_embeddings", False))
        equal = ends.Ends(self.ckpt.folder, says_tied, None if head is None else HEAD, lambda: head is not None
                          and not head.codes and _same(embedding.source(), head.source())).one
        if not equal and not self.family.gguf.own_head:
            raise UserError(f"the head differs from the embedding, and llama.cpp's {self.family.gguf.name} has one matrix",
                            "llama.cpp cannot run this model as it is")
        if equal and self.types.head != self.types.embedding:
            raise UserError(f"head and embedding of {self.ckpt.folder} are one matrix: it cannot be both "
                            f"{self.types.head.name} and {self.types.embedding.name}",
                            "leave --head out; --embedding sets the type of both")
        if head is not None and head.codes and self.types.head_given:
            raise UserError(f"the head of {self.ckpt.folder} is quantized: its codes are copied as {head.kind.name}",
                            "leave --head out")
        return [e for e in found if not (equal and e is head)]

    def _check_mins(self, entries: list[GgufTensor]) -> None:
        """Raise UserError if asymmetric 4-bit GPTQ codes do not fit Q4_1: it stores -scale * zero as a float16."""
        wrong = [e.name for e in entries if e.kind == Kind.Q4_1 and e.codes and _inexact_mins(e.source)]
        if wrong:
            raise UserError(f"{len(wrong)} layers (first {wrong[0]}) have a minimum, -scale * zero, that Q4_1's "
                            "float16 cannot hold exactly", "quantize with --sym: its codes fit Q4_0 bit for bit")


def _inexact_mins(source: Callable[[], Source]) -> bool:
    q = source()
    return isinstance(q, QuantizedTensor) and quantized.minimums(q)[1] > 0


def _same(a: Source, b: Source) -> bool:
    assert isinstance(a, torch.Tensor)
    assert isinstance(b, torch.Tensor)
    return ends.equal(a, b)
