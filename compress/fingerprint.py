"""Which code made an unfinished run."""

from __future__ import annotations

import hashlib
from pathlib import Path

from llmc import block_grids, compress, grids
from llmc.export.blocks import checkpoint as blocks_format
from llmc.export.gguf import packing
from llmc.export.gptq import checkpoint as gptq_format


def code_digest() -> str:
    """Changes when the code that decides the result does, so that `--resume` never mixes two versions."""
    h = hashlib.sha256()
    for module in (compress, grids, block_grids, packing, gptq_format, blocks_format):
        path = Path(str(module.__file__))
        for file in sorted(path.parent.rglob("*.py")) if path.name == "__init__.py" else [path]:
            h.update(file.read_bytes())
    return h.hexdigest()
