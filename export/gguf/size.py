"""How large a .gguf file will be, before there is one."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_VERSION

from llmc.checkpoint import Checkpoint
from llmc.export.gguf import metadata
from llmc.export.gguf.config import GgufExportConfig
from llmc.export.gguf.export import plan_file
from llmc.export.gguf.plan import Types
from llmc.runtimes.torch_model import load_tokenizer

ALIGNMENT = 32  # every tensor of a file begins at a multiple
MARGIN = 4096  # for what a later export may say otherwise: a name, a licence, a template that was replaced


@dataclass(frozen=True)
class Outside:
    """What a file holds beside some matrices.

    tensors: bytes of all other tensors as `llmc export` writes them by default.  parameters: how many weights those have.
    rest: bytes of metadata, vocabulary and the table of tensors, and of the gaps between tensors at their most.
    """

    tensors: int
    parameters: int
    rest: int


def outside(folder: Path, source: dict[str, Any], matrices: set[str]) -> Outside:
    """Of the file that a float folder becomes, beside its `matrices` (names in the checkpoint).

    source: what the manifest says of the folder.  The metadata are written to a file and measured.
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
        rest = path.stat().st_size + ALIGNMENT * (1 + len(plan.entries)) + MARGIN
    others = [e for e in plan.entries if e.stored not in matrices]
    return Outside(sum(e.nbytes for e in others), sum(int(np.prod(e.shape)) for e in others), rest)
