"""A command in a process of its own that is killed as by a power cut: nothing of it gets to clean up."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path


def kill_9(arguments: list[str], folder: Path, sign: str, seconds: float = 300) -> None:
    """Run `llmc ARGUMENTS` and kill it with SIGKILL as soon as `folder` holds something like the pattern `sign`."""
    process = subprocess.Popen([sys.executable, "-P", "-m", "llmc", *arguments], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + seconds
        while not any(folder.glob(sign)):
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline, f"no {sign} after {seconds} s"
            time.sleep(0.002)
    finally:
        process.kill()
        process.wait()
