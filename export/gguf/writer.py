"""The tensors of a GGUF file and its writer. A tensor is read from its source when it is written.

One tensor, or one expert of a stack, is in memory at a time, so the largest one bounds the peak.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch
from gguf import GGUFWriter

from llmc.console import progress
from llmc.export.gguf import blocks
from llmc.export.gguf.blocks import Kind
from llmc.families.names import CLASSES, classify
from llmc.formats.quantized import Quantized

Source = Quantized | torch.Tensor


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file.

    shape: rows first, as in numpy and torch (the file stores it reversed).
    source: reads the values, codes or floats, with the rows in the file's order.
    more: if the tensor is a stack (experts), the sources of the matrices after the first one. All have as many rows.
    codes: True if the source has codes: they are copied and not rounded again.
    stored: the name of a float tensor in the checkpoint.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    source: Callable[[], Source]
    codes: bool = False
    stored: str | None = None
    more: tuple[Callable[[], Source], ...] = ()

    @property
    def sources(self) -> tuple[Callable[[], Source], ...]:
        """The sources of its rows, in their order. One is read at a time."""
        return (self.source, *self.more)

    @property
    def nbytes(self) -> int:
        return blocks.nbytes(self.kind, self.shape)

    @property
    def role(self) -> str:
        """The class of its bytes in the report, one of CLASSES, found by its name. Vectors are 'other'."""
        return classify(self.name) if len(self.shape) > 1 else "other"

    @property
    def order(self) -> tuple[int, str]:
        """The sort key of its position in the file: embedding, layers, all others."""
        if self.name.startswith("token_embd."):
            return -1, self.name
        layer = re.match(r"blk\.(\d+)\.", self.name)
        return (int(layer[1]) if layer else 1 << 30), self.name


class _Data:
    """What the gguf package needs of an array: the data of a tensor, made when they are written, one source at a time."""

    def __init__(self, tensor: GgufTensor) -> None:
        self.tensor, self.nbytes = tensor, tensor.nbytes

    def tofile(self, file: BinaryIO) -> None:
        for source in self.tensor.sources:
            blocks.encode(self.tensor.name, source(), self.tensor.kind).tofile(file)


def write(writer: GGUFWriter, path: Path, entries: list[GgufTensor], check: Callable[[], None] = lambda: None) -> None:
    """Write the metadata in `writer` and the tensors to `path`.

    check: is called before the first tensor is written, when the file has its header and its full length but no weights.
    """
    for e in entries:
        # gguf does not use the dtype, because the type is given
        writer.add_tensor_info(e.name, e.shape, np.dtype(np.float32), e.nbytes, raw_dtype=e.kind)
    writer.write_header_to_file(path)
    try:
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        _lengthen(writer, path, entries)
        check()
        with progress("writing tensor", len(entries)) as p:
            for e in entries:
                writer.write_tensor_data(cast(np.ndarray, _Data(e)))
                p.step(e.name)
    finally:
        writer.close()


def _lengthen(writer: GGUFWriter, path: Path, entries: list[GgufTensor]) -> None:
    """Give the file its final length. What is not written yet takes no space on most disks."""
    assert writer.fout is not None
    writer.fout[0].flush()
    pad = GGUFWriter.ggml_pad
    start = pad(writer.fout[0].tell(), writer.data_alignment)
    os.truncate(path, start + sum(pad(e.nbytes, writer.data_alignment) for e in entries))


def bytes_by_role(entries: list[GgufTensor]) -> dict[str, int]:
    """The bytes of the tensors of each class."""
    return {role: sum(e.nbytes for e in entries if e.role == role) for role in CLASSES}


def file_type(entries: list[GgufTensor]) -> tuple[int, str]:
    """general.file_type and its name: the most frequent type of the decoder's weights."""
    from gguf import LlamaFileType

    count: dict[Kind, int] = {}
    for e in entries:
        if e.role in ("attention", "mlp"):
            count[e.kind] = count.get(e.kind, 0) + int(np.prod(e.shape))
    kind = max(count, key=lambda k: count[k]) if count else Kind.F32
    if kind == Kind.F32:
        return int(LlamaFileType.ALL_F32), kind.name
    names = LlamaFileType.__members__
    # when llama.cpp has to guess, it labels a file of mostly Q3_K, Q4_K or Q5_K as medium; MXFP4 is for experts
    spelled = (f"MOSTLY_{kind.name}{suffix}" for suffix in ("", "_M", "_MOE"))
    return int(next(names[name] for name in spelled if name in names)), kind.name
