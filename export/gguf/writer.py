"""The tensors of a GGUF file, each read from its source when its turn comes, and the writing of the file.

One tensor is in memory at a time, so the peak is bounded by the largest one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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
class Entry:
    """One tensor of the file.

    shape: rows first, as numpy and torch have it (the file stores it reversed).
    source: reads what the tensor must hold, rows already in the file's order: codes on a type, or floats.
    codes: the source is codes, which are carried over and not rounded again.
    stored: the checkpoint's name of a float tensor.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    source: Callable[[], Source]
    codes: bool = False
    stored: str | None = None

    @property
    def nbytes(self) -> int:
        return blocks.nbytes(self.kind, self.shape)

    @property
    def role(self) -> str:
        """Which class of bytes it counts to, one of CLASSES: by its name, vectors apart."""
        return classify(self.name) if len(self.shape) > 1 else "other"

    @property
    def order(self) -> tuple[int, str]:
        """Position in the file: embedding, layers, the rest."""
        if self.name.startswith("token_embd."):
            return -1, self.name
        layer = re.match(r"blk\.(\d+)\.", self.name)
        return (int(layer[1]) if layer else 1 << 30), self.name


def write(writer: GGUFWriter, path: Path, entries: list[Entry]) -> None:
    """Write metadata (already collected in `writer`) and tensors to `path`."""
    for e in entries:
        # the dtype only matters where gguf derives the type from it; here the type is given
        writer.add_tensor_info(e.name, e.shape, np.dtype(np.float32), e.nbytes, raw_dtype=e.kind)
    writer.write_header_to_file(path)
    try:
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with progress("writing tensor", len(entries)) as p:
            for e in entries:
                writer.write_tensor_data(blocks.encode(e.name, e.source(), e.kind))
                p.step(e.name)
    finally:
        writer.close()


def bytes_by_role(entries: list[Entry]) -> dict[str, int]:
    """Bytes of the tensors of each class."""
    return {role: sum(e.nbytes for e in entries if e.role == role) for role in CLASSES}


def file_type(entries: list[Entry]) -> tuple[int, str]:
    """general.file_type and its name: the type that most of the decoder's weights have."""
    from gguf import LlamaFileType

    count: dict[Kind, int] = {}
    for e in entries:
        if e.role in ("attention", "mlp"):
            count[e.kind] = count.get(e.kind, 0) + int(np.prod(e.shape))
    kind = max(count, key=lambda k: count[k]) if count else Kind.F32
    if kind == Kind.F32:
        return int(LlamaFileType.ALL_F32), kind.name
    names = LlamaFileType.__members__
    plain = f"MOSTLY_{kind.name}"
    # llama.cpp calls a file whose commonest type is Q3_K, Q4_K or Q5_K the medium one when it has to guess
    return int(names[plain] if plain in names else names[f"{plain}_M"]), kind.name
