"""The form and the values of every matrix of a checkpoint in the ONNX file. Forms are decided before a byte is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from llmc.errors import UserError
from llmc.export.onnx import layout, w8a8
from llmc.export.onnx.config import OnnxExportConfig
from llmc.formats import quantized
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.manifest import read_manifest
from llmc.formats.types import BLOCK_TYPES, BlockType, IntegerType, QuantizedTensor
from llmc.rounding.tables import round_table

Form = IntegerType | str  # the type of the codes, or 'fp32', 'fp16' or W8A8
W8A8 = "w8a8"
END_BITS = {"q8_0": 8, "q4_0": 4, "f16": 16}


def form_name(form: Form) -> str:
    """The name of a form: 'int4-sym-g32', 'fp16'."""
    return form.name if isinstance(form, IntegerType) else form


@dataclass(frozen=True)
class Source:
    """A float matrix of the checkpoint. shape: [N, K].  read: returns its values in the stored type.  is_expert: it is the
    matrix of one expert."""

    shape: tuple[int, int]
    read: Callable[[], torch.Tensor]
    is_expert: bool = False


@dataclass(frozen=True)
class Piece:
    """Rows start:stop of one of the checkpoint's matrices."""

    module: str
    start: int
    stop: int


class Weights:
    """The matrices of a model by module name. Reads one at a time."""

    def __init__(self, config: OnnxExportConfig, ckpt: Checkpoint, embedding: str, head: str,
                 sources: Mapping[str, Source]) -> None:
        """embedding, head: module names in the checkpoint; one name if they are one matrix.  sources: of float matrices."""
        self.ckpt, self.embedding, self.head, self.sources = ckpt, embedding, head, sources
        self.exact = set[str]()  # routers: their float matrices stay float32, so that the same experts are chosen
        self.linears = set(quantized.linears(ckpt))
        self.notes = quantized.notes_of_codes(ckpt)
        if self.linears and config.dtype is not None:
            raise UserError(f"{ckpt.folder} is quantized: its codes are copied, so --dtype {config.dtype} has no effect",
                            "leave --dtype out, or export the float model")
        self.dtype = "fp16" if self.linears else config.dtype or "fp16"
        if self.dtype == W8A8 and not _smoothed(ckpt):
            self.notes.append(f"{ckpt.folder} has no SmoothQuant scaling: the largest input channels set the step of all "
                              "others; run `llmc transform MODEL --scaling smoothquant` first, which lowers the loss")
        self.end_bits, self.reason = self._end_bits(config)
        if config.head_bits is not None and head in self.linears:
            raise UserError(f"the head of {ckpt.folder} is quantized: its codes are copied", "leave --head-bits out")
        self._refuse_types()
        self.read = lru_cache(maxsize=4)(self._read)

    def _end_bits(self, config: OnnxExportConfig) -> tuple[dict[str, int | None], str]:
        """The bits of the modules of embedding and head, None for the type in --dtype; and the reason."""
        def both(bits: int | None) -> dict[str, int | None]:
            return dict.fromkeys((self.embedding, self.head), bits)

        if config.head_bits is not None:
            return both(config.head_bits), "as asked"
        wanted = quantized.end_types(self.ckpt)
        types = sorted(set(wanted.values()))
        if len(types) == 1 and types[0] in END_BITS:
            return both(END_BITS[types[0]]), "as the folder was made for"
        if self.linears:
            bits = quantized.bits_per_weight(self.ckpt)
            table = quantized.ends_beside(bits, layout.BLOCK)[1]
            small = BLOCK_TYPES[table].bits_per_weight < 5 and config.int4 != "qdq"  # Gather takes no int4
            near = {self.embedding: 4 if small else 8, self.head: 8}
            if types:
                used = " and ".join(f"{n} bits for {end}" for end, n in near.items())
                self.notes.append(f"the folder was made for embedding and lm_head in {' and '.join(types)}, which ONNX "
                                  f"Runtime does not have: {used} in blocks of 32 are used instead; --head-bits sets both")
            return dict(near), f"chosen beside a decoder of {bits:.1f} bits"
        if self.dtype in ("int8", W8A8):
            return both(8), "8 bits beside a quantized decoder"
        return both(None), "as --dtype"

    def _refuse_types(self) -> None:
        """Raise one UserError for all linears with a type that no ONNX type holds."""
        lost: Counter[str] = Counter()
        first: dict[str, str] = {}
        for linear in sorted(self.linears):
            qtype = quantized.type_of(self.ckpt, linear)
            held = layout.held_as(qtype) is not None
            if held and isinstance(qtype, BlockType) and qtype.has_min:
                held = layout.exact(quantized.read(self.ckpt, linear)) is not None
            if not held:
                lost[qtype.name] += 1
                first.setdefault(qtype.name, linear)
        if lost:
            what = ", ".join(f"{n} linears in {name} (first {first[name]})" for name, n in sorted(lost.items()))
            bits = {name: 8 if name.startswith(("q5", "q6")) else 4 for name in lost}
            most = max(bits.values())
            nearest = " and ".join(sorted({"q4_0" if b == 4 else "q8_0" for b in bits.values()}))
            raise UserError(
                f"ONNX Runtime has no weight type that holds {what} exactly; its nearest types: {nearest}",
                f"quantize the float model again with `llmc quantize MODEL --bits {most} --group-size 32`")

    @property
    def tied(self) -> bool:
        return self.embedding == self.head

    def columns(self, module: str) -> int:
        return int(quantized.shape(self.ckpt, module)[1]) if module in self.linears else self.sources[module].shape[1]

    def form(self, module: str) -> Form:
        """The form in which the matrix of a module is stored."""
        if module in self.linears:
            qtype = layout.held_as(quantized.type_of(self.ckpt, module))
            assert qtype is not None
            return qtype
        if module in self.exact:
            return "fp32"
        is_end = module in (self.embedding, self.head)
        bits = self.end_bits[module] if is_end else 8 if self.dtype == "int8" else None
        if bits in (4, 8):
            columns = self.columns(module)
            if columns % layout.BLOCK:
                raise UserError(f"{module} has rows of {columns} weights, which blocks of {layout.BLOCK} do not divide",
                                "--head-bits 16 keeps it in float16" if is_end else "use --dtype fp16")
            return IntegerType(bits, layout.BLOCK)
        if self.dtype == W8A8 and not is_end and not self.sources[module].is_expert:
            return W8A8
        return "fp16" if bits == 16 or self.dtype != "fp32" else "fp32"

    def form_of(self, pieces: list[Piece]) -> Form:
        """The form of all pieces of a node."""
        forms = {self.form(p.module) for p in pieces}
        assert len(forms) == 1, "the graph joins only matrices of one form"
        return forms.pop()

    def _read(self, module: str) -> torch.Tensor | QuantizedTensor:
        """A whole matrix [N, K]: codes if its form is a quantization type or W8A8, else float32 or float16."""
        form = self.form(module)
        if module in self.linears:
            q = layout.exact(quantized.read(self.ckpt, module))
            assert q is not None
            return q
        w = self.sources[module].read()
        if isinstance(form, IntegerType):
            try:
                q = layout.exact(round_table(w, layout.ROUNDED[form.bits]))
            except ValueError as e:
                raise UserError(f"{module} has {e}", "use --dtype fp32, or --head-bits 16") from e
            assert q is not None
            return q
        if form == W8A8:
            return _finite(module, w8a8.round_rows(w))
        stored = w.to(torch.float32 if form == "fp32" else torch.float16)
        if not bool(torch.isfinite(stored).all()):
            raise UserError(f"{module} holds values beyond float16's maximum, {torch.finfo(torch.float16).max:g}",
                            "use --dtype fp32 or int8")
        return stored

    def values(self, pieces: list[Piece]) -> torch.Tensor:
        """The rows of float pieces, joined, [N, K]."""
        return torch.cat([self.read(p.module)[p.start : p.stop] for p in pieces])  # type: ignore[index]

    def codes(self, pieces: list[Piece]) -> QuantizedTensor:
        """The rows of quantized pieces of one type, joined, [N, K]."""
        whole: list[Any] = [self.read(p.module) for p in pieces]
        parts: list[Any] = [quantized.rows_of(q, slice(p.start, p.stop)) for q, p in zip(whole, pieces, strict=True)]
        zeros = None if parts[0].zeros is None else torch.cat([q.zeros for q in parts])
        return QuantizedTensor(parts[0].type, torch.cat([q.codes for q in parts]), torch.cat([q.scales for q in parts]),
                               zeros)

    def source(self, module: str) -> QuantizedTensor:
        """The codes that the file must hold for a matrix, read or rounded again from the checkpoint."""
        q = self._read(module)
        assert isinstance(q, QuantizedTensor)
        return q

    def as_stored(self, module: str) -> torch.Tensor:
        """The values of a matrix in the file, float32 [N, K]."""
        w = self.read(module)
        return w.dequantize() if isinstance(w, QuantizedTensor) else w.to(torch.float32)


def _smoothed(ckpt: Checkpoint) -> bool:
    """True if SmoothQuant is one of the passes that made the folder."""
    passes = (read_manifest(ckpt.folder) or {}).get("passes", [])
    return any(p.get("config", {}).get("scaling") == "smoothquant" for p in passes)


def _finite(module: str, q: QuantizedTensor) -> QuantizedTensor:
    if not bool(torch.isfinite(q.scales).all()):
        raise UserError(f"{module} has weights that are not finite, or too large for the scale's type",
                        "use --dtype fp32, or --head-bits 16")
    return q
