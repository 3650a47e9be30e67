"""How large a .gguf file will be, before there is one."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_VERSION
from gguf.constants import GGUF_DEFAULT_ALIGNMENT

from llmc.export.gguf import metadata
from llmc.export.gguf.config import GgufExportConfig
from llmc.export.gguf.export import plan_file
from llmc.export.gguf.plan import Types
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.hf import load_tokenizer


@dataclass(frozen=True)
class Outside:
    """What a file holds beside some matrices.

    tensors: bytes of all other tensors as `llmc export` writes them by default.  parameters: how many weights those have.
    rest: bytes of metadata, vocabulary and the table of tensors, and of the gaps after them and after the other tensors.
    """

    tensors: int
    parameters: int
    rest: int


def in_file(nbytes: int) -> int:
    """What a tensor of `nbytes` takes in a file: each is filled up so that the next one is aligned."""
    return -(-nbytes // GGUF_DEFAULT_ALIGNMENT) * GGUF_DEFAULT_ALIGNMENT


def outside(folder: Path, source: dict[str, Any], matrices: set[str]) -> Outside:
    """Of the file that a float folder becomes, beside its `matrices` (names in the checkpoint): exact for what `llmc export`
    makes of the quantized folder without further options.

    source: what the quantized folder's manifest will say of its origin.  The metadata are written to a file and measured.
    """
    config = GgufExportConfig(model=folder)
    ckpt = Checkpoint.open(folder)
    plan = plan_file(config, ckpt, load_tokenizer(folder), Types.choose(config, ckpt))
    w = plan.writer
    metadata.add_provenance(w, source, plan.vocabulary, sum(int(np.prod(e.shape)) for e in plan.entries))
    w.add_file_type(0)
    w.add_quantization_version(GGML_QUANT_VERSION)
    for e in plan.entries:
        w.add_tensor_info(e.name, e.shape, np.dtype(np.float32), e.nbytes, raw_dtype=e.kind)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "metadata.gguf"
        w.write_header_to_file(path)
        try:
            w.write_kv_data_to_file()
            w.write_ti_data_to_file()
        finally:
            w.close()
        written = path.stat().st_size
    others = [e for e in plan.entries if e.stored not in matrices]
    rest = in_file(written) + sum(in_file(e.nbytes) - e.nbytes for e in others)
    return Outside(sum(e.nbytes for e in others), sum(int(np.prod(e.shape)) for e in others), rest)
