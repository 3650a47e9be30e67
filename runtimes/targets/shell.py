"""The POSIX shell of a device, by which llmc copies and starts things there.

Scripts are constants of llmc; whatever a user can name (paths, file names, Pythons) comes as an argument, "$1", "$2" …
of the script, and only `command_line` quotes.
"""

from __future__ import annotations

import shlex
import subprocess
from typing import Any, Protocol

from llmc.errors import UserError


class Shell(Protocol):
    """A device that runs shell scripts."""

    name: str
    """The target's, for messages."""

    def popen(self, script: str, *args: str, **how: Any) -> subprocess.Popen[Any]:
        """Start a script there; its stdin, stdout, stderr and exit code are the process's own. how: as of Popen."""


def command_line(script: str, *args: str) -> str:
    """One line for a device's login shell that runs `script` in sh with these arguments."""
    return shlex.join(["sh", "-c", script, "llmc", *args])


def run(shell: Shell, script: str, *args: str, expect: tuple[int, ...] = ()) -> tuple[int, str]:
    """(exit code, stdout) of a script whose exit code is 0 or one of `expect`; any other raises UserError."""
    process = shell.popen(script, *args, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate()
    if process.returncode not in (0, *expect):
        raise failure(shell, process.returncode, err)
    return process.returncode, out.decode(errors="surrogateescape")


def failure(shell: Shell, code: int, err: bytes) -> UserError:
    """A script of llmc that failed on a device."""
    lines = err.decode(errors="replace").strip().splitlines()
    return UserError(f"target {shell.name}: {lines[-1] if lines else f'a command ended with exit code {code}'}",
                     f"see that the device is reachable and its cache folder writable: llmc target probe {shell.name}")
