"""The POSIX shell of a device. llmc uses it to copy files and to start programs there.

Scripts are constants of llmc. Values from the user (paths, file names, Pythons) are arguments of the script ("$1", "$2", ..),
and only `command_line` quotes them.
"""

from __future__ import annotations

import shlex
import subprocess
from typing import Any, Protocol

from llmc.errors import UserError


class Shell(Protocol):
    """A device that runs shell scripts."""

    name: str
    """The target's name, for messages."""

    def popen(self, script: str, *args: str, **how: Any) -> subprocess.Popen[Any]:
        """Start a script there. The process has its stdin, stdout, stderr and exit code. how: the options of Popen."""


def command_line(script: str, *args: str) -> str:
    """The command line, for a device's login shell, that runs `script` in sh with these arguments."""
    return shlex.join(["sh", "-c", script, "llmc", *args])


def run(shell: Shell, script: str, *args: str, expect: tuple[int, ...] = ()) -> tuple[int, str]:
    """Run a script; return (exit code, stdout). Raises UserError unless the exit code is 0 or one of `expect`."""
    process = shell.popen(script, *args, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate()
    if process.returncode not in (0, *expect):
        raise failure(shell, process.returncode, err)
    return process.returncode, out.decode(errors="surrogateescape")


def failure(shell: Shell, code: int, err: bytes) -> UserError:
    """The error for a script of llmc that failed on a device."""
    lines = err.decode(errors="replace").strip().splitlines()
    return UserError(f"target {shell.name}: {lines[-1] if lines else f'a command ended with exit code {code}'}",
                     f"check that the device is reachable and its cache folder writable: llmc target probe {shell.name}")
