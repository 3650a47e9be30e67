"""The size of a .gguf file before it is written."""

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
    """The part of a file outside of some matrices.

    tensors: bytes of all other tensors as `llmc export` writes them by default. parameters: number of weights in them.
    rest: bytes of metadata, vocabulary, tensor index and alignment padding.
    """

    tensors: int
    parameters: int
    rest: int


def in_file(nbytes: int) -> int:
    """The bytes that a tensor of `nbytes` takes in a file, with the padding that aligns the next one."""
    return -(-nbytes // GGUF_DEFAULT_ALIGNMENT) * GGUF_DEFAULT_ALIGNMENT


def outside(folder: Path, source: dict[str, Any], matrices: set[str]) -> Outside:
    """The size of a float folder's future file outside of its `matrices` (names in the checkpoint).

    It is exact for `llmc export` of the quantized folder without further options. The metadata are written to a temporary
    file and measured. source: the origin that the quantized folder's manifest will record.
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
