"""Messages, warnings and progress: a progress line with the time left on a terminal, a few lines in a log.

Results go to stdout. All other output goes to stderr, so that `--json` output can be piped.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_quiet = False


def set_quiet(quiet: bool) -> None:
    """Turn `say` and progress off or on. Warnings and errors always appear."""
    global _quiet
    _quiet = quiet


def say(message: str) -> None:
    """Print one line about the current work."""
    if not _quiet:
        tell(f"{message}\n")


def warn(message: str) -> None:
    """Print one line that the user must not miss."""
    tell(f"warning: {message}\n")


def tell(text: str) -> None:
    """Write to stderr. Work goes on if nobody reads it: the reader of a pipe has left, or the terminal was closed."""
    with suppress(OSError):
        if sys.stderr is not None:
            print(text, end="", file=sys.stderr, flush=True)


def terminal() -> bool:
    """Whether stderr is a terminal that understands control characters and may get them."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return sys.stderr is not None and sys.stderr.isatty() and not plain


def command(*words: object) -> str:
    """A command line that a shell takes apart into these words."""
    texts = [str(w) for w in words]
    return subprocess.list2cmdline(texts) if os.name == "nt" else shlex.join(texts)


def duration(seconds: float) -> str:
    """Seconds as text: '8 s', '2 min 05 s', '1 h 07 min'."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    return f"{s // 60} min {s % 60:02d} s" if s < 3600 else f"{s // 3600} h {s % 3600 // 60:02d} min"


def size(n: float) -> str:
    """Bytes as text in decimal units, as disks are labelled: '91.7 MB'."""
    for unit in ("B", "kB", "MB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.2f} GB"


def parse_size(text: str) -> int | None:
    """The bytes of '90MB', '1.2 GB' or '85MiB'; None if it is not a size. The unit is required: 2 does not mean 2 bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kKMG]?)(i?)B", text.strip())
    if found is None:
        return None
    power = " kMG".index(found[2].replace("K", "k") or " ")
    return round(float(found[1]) * (1024 if found[3] else 1000) ** power)


class Progress:
    """Progress over a known number of steps. A terminal shows one line; a log gets a line at most every `log_every` s."""

    def __init__(self, what: str, total: int, done: int = 0, log_every: float = 30.0) -> None:
        self.what, self.total, self.done, self.log_every = what, total, done, log_every
        self.resumed_at = done
        self.start = self.last = time.monotonic()
        self.terminal = terminal() and not _quiet

    def step(self, note: str = "", n: int = 1) -> None:
        """Count `n` more finished steps; `note` is a short text about the last one."""
        self.done += n
        now = time.monotonic()
        rate = (now - self.start) / max(1, self.done - self.resumed_at)
        line = f"{self.what} {self.done}/{self.total}"
        if self.done < self.total:
            line += f", {duration(rate * (self.total - self.done))} left"
        if note:
            line += f"  {note}"
        if self.terminal:
            tell(f"\r\x1b[2K{line[:118]}")
        elif not _quiet and (now - self.last >= self.log_every or self.done == self.total):
            tell(f"{line}\n")
            self.last = now

    def close(self) -> None:
        if self.terminal:
            tell("\r\x1b[2K")


@contextmanager
def progress(what: str, total: int, done: int = 0) -> Iterator[Progress]:
    """Show progress in a block: `with progress("quantizing layer", 30) as p: p.step("error 0.012")`."""
    p = Progress(what, total, done)
    try:
        yield p
    finally:
        p.close()
