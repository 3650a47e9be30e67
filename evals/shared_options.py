"""Options that several measuring commands share, and parsers for values with units."""

from __future__ import annotations

import re
from typing import Any

from llmc.console import parse_size
from llmc.errors import UserError
from llmc.options import ADVANCED, RUN, option


def device() -> Any:
    return option("cpu", help="Device to run on.", choices=("cpu", "gpu"), group=RUN)


def kv(more: str = "") -> Any:
    return option(None, help=f"Type of the artifact's KV cache.{more}", choices=("f16", "q8_0"), group=ADVANCED,
                  shown="the runtime's default, f16 in llama.cpp")


def parse_bytes(option: str, written: str) -> int:
    """Return the bytes of a size like '2GB'. Raises UserError that names `option` if `written` is not a size."""
    found = parse_size(written)
    if found is None:
        raise UserError(f"{option} {written!r} is not a size", f"write it with a unit, like {option} 2GB or 90MB")
    return found


def parse_number(option: str, written: str, unit: str, example: str) -> float:
    """Return the number in '5%' or '2x' as it is (5.0, 2.0). `unit` may be empty. Raises UserError that names `option`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)" + re.escape(unit), written.strip())
    if not match:
        raise UserError(f"{option} {written!r} is not a number{' with ' + unit if unit else ''}", f"write it like {example}")
    return float(match[1])
