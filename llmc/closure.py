"""What `--resume` compares, beside settings and inputs: the code itself."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from llmc import compress, formats
from llmc.formats import blocks as blocks_format
from llmc.formats import gptq as gptq_format
from llmc.formats import packing
from llmc.formats import types as block_types
from llmc.formats import types as types

DECIDING = (compress, formats, types, block_types, packing, gptq_format, blocks_format)


def code_digest(modules: Sequence[ModuleType] = DECIDING) -> str:
    """sha256 that changes when the code that decides a result does, so that `--resume` never mixes two versions."""
    h = hashlib.sha256()
    for module in modules:
        path = Path(str(module.__file__))
        for file in sorted(path.parent.rglob("*.py")) if path.name == "__init__.py" else [path]:
            h.update(file.read_bytes())
    return h.hexdigest()
