"""How large a .gguf file will be, before there is one."""

from __future__ import annotations

import tempfile
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


def outside_bytes(folder: Path, source: dict[str, Any], matrices: set[str]) -> tuple[int, int]:
    """(tensors, the rest) of the file that a float folder becomes, its `matrices` (names in the checkpoint) left out.

    source: what the manifest says of the folder.

    tensors: bytes of all other tensors as `llmc export` writes them by default.  the rest: metadata, vocabulary and the
    table of tensors, as written to a file and measured, and the gaps between tensors at their most.
    """
    config = GgufExportConfig(model=folder)
    ckpt = Checkpoint.open(folder)
    plan = plan_file(config, ckpt, load_tokenizer(folder), Types.choose(config, ckpt))
    others = [e for e in plan.entries if e.stored not in matrices]
    metadata.add_provenance(plan.writer, source, plan.vocabulary,
                            sum(int(np.prod(e.shape)) for e in plan.entries))
    plan.writer.add_file_type(0)
    plan.writer.add_quantization_version(GGML_QUANT_VERSION)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "metadata.gguf"
        for e in plan.entries:
            plan.writer.add_tensor_info(e.name, e.shape, np.dtype(np.float32), e.nbytes, raw_dtype=e.kind)
        plan.writer.write_header_to_file(path)
        try:
            plan.writer.write_kv_data_to_file()
            plan.writer.write_ti_data_to_file()
        finally:
            plan.writer.close()
        rest = path.stat().st_size
    return sum(e.nbytes for e in others), rest + ALIGNMENT * (1 + len(plan.entries)) + MARGIN
