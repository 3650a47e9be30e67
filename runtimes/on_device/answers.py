"""Answers of a process on standard output, as JSON lines. The output of libraries goes to standard error."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO


@contextmanager
def answers() -> Iterator[BinaryIO]:
    """Redirect standard output to standard error; yield a file that writes to the real standard output."""
    kept = os.dup(1)
    os.dup2(2, 1)
    with os.fdopen(kept, "wb") as out:
        yield out


def say(out: BinaryIO, value: dict[str, Any]) -> None:
    """Write one JSON object as one line, and flush."""
    out.write(json.dumps(value).encode() + b"\n")
    out.flush()
