"""Standard output kept for a process's answers: what a library prints goes to standard error."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO


@contextmanager
def answers() -> Iterator[BinaryIO]:
    """Inside, whatever prints to standard output prints to standard error; the file yielded is the real one."""
    kept = os.dup(1)
    os.dup2(2, 1)
    with os.fdopen(kept, "wb") as out:
        yield out


def say(out: BinaryIO, value: dict[str, Any]) -> None:
    """One JSON object in a line of its own, sent at once."""
    out.write(json.dumps(value).encode() + b"\n")
    out.flush()
