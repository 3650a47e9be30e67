"""The plan of a GGUF file: the name, the type and the position of every tensor. It is complete before a byte is written."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter

from llmc.errors import UserError
from llmc.export.gguf import blocks
from llmc.export.gguf.architectures import TensorNames, apart, interleave
from llmc.export.gguf.blocks import Kind
from llmc.export.gguf.config import GgufExportConfig
from llmc.export.gguf.tokenizer import Vocabulary
from llmc.export.gguf.writer import GgufTensor, Source
from llmc.families.row import Family
from llmc.formats import ends, quantized
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.contents import is_buffer
from llmc.formats.layouts import listed

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"  # llama.cpp's names
FLOAT32 = re.compile(r"norm\.weight$|^position_embd\.|\.ffn_gate_inp(_shexp)?\.|\.shortconv\.conv\.")


@dataclass(frozen=True)
class Types:
    """The types of the float matrices, and the reason for those of embedding and head.

    embedding, head: None if llmc chooses them by the rows and `bits`, the bits per weight of the decoder.  head_given: the
    user gave the head's type."""

    matrix: Kind
    embedding: Kind | None
    head: Kind | None
    head_given: bool
    reason: str
    bits: float = 0.0

    @classmethod
    def choose(cls, config: GgufExportConfig, ckpt: Checkpoint) -> Types:
        """The types in `config`; else those recorded in the folder (`quantized.end_types`); else those that go with the
        decoder (`quantized.ends_beside`), and --float-type for a float model."""
        wanted, bits = quantized.end_types(ckpt), 0.0
        embedding, reason = config.embedding, "as asked"
        if embedding is None and "embedding" in wanted:
            embedding, reason = wanted["embedding"], "as the folder was made for"
        elif embedding is None and quantized.is_quantized(ckpt):
            bits = quantized.bits_per_weight(ckpt)
            reason = f"chosen beside a decoder of {bits:.1f} bits"
        elif embedding is None:
            embedding, reason = config.float_type, "the same as --float-type"
        head = config.head or wanted.get("head", embedding)
        embedding_kind, head_kind = (None if name is None else Kind[name.upper()] for name in (embedding, head))
        return cls(Kind[config.float_type.upper()], embedding_kind, head_kind, config.head is not None, reason, bits)

    def of(self, name: str, shape: tuple[int, ...]) -> Kind:
        """The type of a tensor. Vectors and what FLOAT32 matches stay F32, as llama.cpp wants them."""
        if name in (EMBEDDING, OUTPUT):
            head, embedding = quantized.ends_beside(self.bits, shape[-1])
            given, chosen = (self.embedding, embedding) if name == EMBEDDING else (self.head, head)
            return given if given is not None else Kind[chosen.upper()]
        return Kind.F32 if len(shape) == 1 or FLOAT32.search(name) else self.matrix

    def of_both(self, shape: tuple[int, ...]) -> Kind:
        """The type of an embedding that is the head too: the head's, unless the embedding's was given."""
        return self.of(OUTPUT if self.embedding is None else EMBEDDING, shape)


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

    def __init__(self, ckpt: Checkpoint, family: Family, hf: Any, types: Types, writer: GGUFWriter) -> None:
        self.ckpt, self.family, self.hf, self.types, self.writer = ckpt, family, hf, types, writer
        self.names = TensorNames(family, hf.num_hidden_layers)
        self.linears = set(quantized.linears(ckpt))
        self.notes = quantized.notes_of_codes(ckpt)
        self.scalars: dict[str, dict[int, float]] = {key: {} for key in family.gguf.scalars.values()}

    def entries(self) -> list[GgufTensor]:
        unheld = sorted(n for n in self.linears if quantized.block_type(quantized.type_of(self.ckpt, n)) is None)
        placed = [(self._unheld(n) if n in unheld else self._quantized(n), f"{n}.weight") for n in self.linears]
        if unheld:
            types = " and ".join(sorted({quantized.type_name(self.ckpt, n) for n in unheld}))
            self.notes.append(f"no GGUF type holds {types}: the codes of {len(unheld)} linears ({listed(unheld)}) are "
                              f"written as their values in {self.types.matrix.name}, which takes more bytes")
        packed = {name for linear in self.linears for name in quantized.parts(linear)}
        zero_biases = 0
        for name in self.ckpt.names():
            if name in packed or is_buffer(name, self.ckpt.shape(name)):
                continue
            if name.endswith(".bias") and name.removesuffix(".bias") in self.linears and self._is_spare(name):
                zero_biases += 1
            elif not self._is_scalar(name):
                placed.append((self._float(name), name))
        if zero_biases:
            self.notes.append(f"{zero_biases} biases that are all zero were left out")
        found = self._tie(self._stack(placed))
        names = [e.name for e in found]
        if twice := next((n for n in names if names.count(n) > 1), None):
            raise UserError(f"two tensors of {self.ckpt.folder} map to {twice}", "the checkpoint holds a weight twice")
        return sorted(found, key=lambda e: e.order)

    def _stack(self, placed: list[tuple[GgufTensor, str]]) -> list[GgufTensor]:
        """Make one tensor of all experts' matrices of one kind in a layer. placed: tensors with their stored names."""
        found, stacks = [], dict[str, dict[int, GgufTensor]]()
        for e, name in placed:
            number = self._place(name)[1]
            if number is None:
                found.append(e)
            elif stacks.setdefault(e.name, {}).setdefault(number, e) is not e:
                raise UserError(f"two tensors of {self.ckpt.folder} map to part {number} of {e.name}",
                                "the checkpoint holds a weight twice")
        for name, parts in stacks.items():
            ordered = [parts[i] for i in sorted(parts)]
            first = ordered[0]
            if sorted(parts) != list(range(len(parts))) or len({e.shape for e in ordered}) > 1:
                raise UserError(f"{self.ckpt.folder} has the parts {sorted(parts)} of {name}: some are missing, or their "
                                "shapes differ", "download the model again")
            if kinds := sorted({e.kind.name for e in ordered if e.kind != first.kind or e.codes != first.codes}):
                raise UserError(f"the parts of {name} have the types {first.kind.name} and {', '.join(kinds)}, and a tensor "
                                "has one type", "quantize all experts of a layer to one type")
            found.append(replace(first, shape=(len(ordered), *first.shape), more=tuple(e.source for e in ordered[1:])))
        return found

    def _place(self, name: str) -> tuple[str | None, int | None]:
        """(llama.cpp's name of a tensor, its number in a stack; None if it has none)."""
        if self.family.gguf.head == "tied" and name.endswith("lm_head.weight") and not self.names.find(name):
            return OUTPUT, None  # `_tie` leaves it out, or refuses it
        return self.names.place(name)

    def _gguf_name(self, name: str) -> str:
        if mapped := self._place(name)[0]:
            return mapped
        raise UserError(f"{name} of {self.ckpt.folder} has no place in llama.cpp's {self.family.gguf.name} architecture",
                        "the checkpoint holds tensors that the architecture in its config.json does not have")

    def _is_spare(self, bias: str) -> bool:
        """True for an all-zero bias that AutoGPTQ added to a linear without one."""
        return not self.family.gguf.biased and not bool(self.ckpt.tensor(bias).any())

    def add_values(self, entries: list[GgufTensor]) -> None:
        """Write the metadata that are found in the tensors: the width of MLPs, and lists with one number for each layer."""
        widths = {e.shape[-1] for e in entries if e.name.endswith(".ffn_down.weight")} or {self.hf.intermediate_size}
        if len(widths) > 1:
            raise UserError(f"the MLPs of {self.ckpt.folder} have the widths {sorted(widths)}, and llmc writes one for all "
                            "layers", "llmc cannot write this model into GGUF")
        self.writer.add_feed_forward_length(widths.pop())
        for key, values in self.scalars.items():
            if sorted(values) != list(range(self.hf.num_hidden_layers)):
                raise UserError(f"{self.ckpt.folder} has {key} for {len(values)} of {self.hf.num_hidden_layers} layers",
                                "download the model again")
            getattr(self.writer, f"add_{key}")([values[i] for i in sorted(values)])

    def _is_scalar(self, name: str) -> bool:
        """True for a tensor that is a number of its layer in llama.cpp's metadata. Keeps the number."""
        found = re.search(r"\.(\d+)\.(.*)", name)
        key = self.family.gguf.scalars.get(found[2]) if found else None
        if found and key:
            self.scalars[key][int(found[1])] = float(self.ckpt.tensor(name))
        return key is not None

    def _rows(self, module: str, rows: int) -> np.ndarray | None:
        """The order of the rows in the file; None if it is that of the checkpoint."""
        role = self.family.role_of(module)
        if self.family.qkv_by_head and role == "attn_qkv":
            return apart(rows, self.hf.num_attention_heads, self.family.key_heads(self.hf))
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

    def _unheld(self, linear: str) -> GgufTensor:
        """A linear whose codes no GGUF type holds, as its values."""
        shape, kind = quantized.shape(self.ckpt, linear), self.types.matrix
        blocks.check_rows(linear, shape, kind)
        rows = self._rows(linear, shape[0])

        def source() -> Source:
            w = quantized.dequantized(self.ckpt, linear)
            return w if rows is None else reorder(w, rows)

        return GgufTensor(self._gguf_name(f"{linear}.weight"), shape, kind, source)

    def _float(self, name: str) -> GgufTensor:
        module, _, what = name.rpartition(".")
        shape = self.ckpt.shape(name)
        if len(shape) == 3 and shape[1] == 1:  # the kernels of a convolution: llama.cpp's have two axes
            shape = (shape[0], shape[2])
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
            t = t.t() if transposed else t.reshape(shape)
            if offset:
                t = t.to(torch.float32) + offset
            return t if rows is None else reorder(t, rows)

        return GgufTensor(mapped, shape, kind, source, stored=name)

    def _tie(self, found: list[GgufTensor]) -> list[GgufTensor]:
        """Remove a head that equals the embedding: llama.cpp then uses the embedding for both.

        Raises UserError if config.json, the checkpoint, the options and the architecture contradict each other."""
        embedding = next((e for e in found if e.name == EMBEDDING), None)
        if embedding is None:
            raise UserError(f"{self.ckpt.folder} has no token embedding", "download the model again")
        head, rule = next((e for e in found if e.name == OUTPUT), None), self.family.gguf.head
        head_name = None if head is None else head.stored or OUTPUT
        says_tied = bool(getattr(self.hf, "tie_word_embeddings", False))
        equal = ends.Ends(self.ckpt.folder, says_tied, head_name, lambda: head is not None
                          and not head.codes and _same(embedding.source(), head.source())).one
        if not equal and rule == "tied":
            raise UserError(f"the head differs from the embedding, and llama.cpp's {self.family.gguf.name} has one matrix",
                            "llama.cpp cannot run this model as it is")
        if equal and rule == "own":  # llama.cpp reads a second copy
            kind = self.types.of(OUTPUT, embedding.shape)
            blocks.check_rows(OUTPUT, embedding.shape, kind)
            return [e for e in found if e is not head] + [replace(embedding, name=OUTPUT, kind=kind)]
        if equal:
            kinds = [self.types.of(name, embedding.shape) for name in (OUTPUT, EMBEDDING)]
            if self.types.head is not None and kinds[0] != kinds[1]:
                raise UserError(f"head and embedding of {self.ckpt.folder} are one matrix: it cannot be both "
                                f"{kinds[0].name} and {kinds[1].name}",
                                "leave --head out; --embedding sets the type of both")
            both = replace(embedding, kind=self.types.of_both(embedding.shape))
            return [both if e is embedding else e for e in found if e is not head]
        if head is not None and head.codes and self.types.head_given:
            raise UserError(f"the head of {self.ckpt.folder} is quantized: its codes are copied as {head.kind.name}",
                            "leave --head out")
        return found


def _same(a: Source, b: Source) -> bool:
    assert isinstance(a, torch.Tensor)
    assert isinstance(b, torch.Tensor)
    return ends.equal(a, b)
