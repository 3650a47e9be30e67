"""Notes and states of llmc's own, as JSON with a checksum of their content. A file that was cut, mixed or edited is told from
one that llmc wrote, so what reads the values needs no checks of its own.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

from llmc.errors import UserError
from llmc.small_files import LARGE, read_json_object

SEAL = "crc32"


def sealed(values: dict[str, Any]) -> dict[str, Any]:
    """The values with their checksum. They must be what JSON gives back: texts as keys, lists instead of tuples."""
    return {**values, SEAL: zlib.crc32(json.dumps(values, sort_keys=True).encode())}


def read_sealed(path: Path, hint: str) -> dict[str, Any]:
    """What was written with `sealed`. Raises UserError with the hint if it is anything else."""
    found = read_json_object(path, LARGE, hint)
    seal = found.pop(SEAL, None)
    if seal != sealed(found)[SEAL]:
        raise UserError(f"{path} is damaged: it is not as llmc wrote it", hint)
    return found
