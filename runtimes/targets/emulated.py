"""`emulated-arm64`: this machine runs aarch64 programs under qemu-user, from a separate small Debian tree.

It tests the ARM code path: the same llama.cpp or onnxruntime, compiled for aarch64 with dotprod and i8mm, gives logits that
can be compared with this machine's. Its speed is not the speed of any device.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from llmc.errors import UserError
from llmc.runtimes.targets import agent
from llmc.runtimes.targets.python_device import PythonDevice
from llmc.runtimes.targets.target import Target

QEMU = ("qemu-aarch64-static", "qemu-aarch64")
# dotprod and i8mm, like phones and new boards. No SVE, because few devices have it. Pointer authentication is slow in qemu.
CPU = "max,sve=off,sme=off,pauth-impdef=on"
TREE = "emulated-arm64"  # folder in the target's cache
SITE = "site"  # folder in the tree for pip's packages
DEBIAN = "sudo apt-get install qemu-user-static g++-aarch64-linux-gnu"


def find_qemu() -> str | None:
    """The path of the emulator for programs (not for whole machines), None if it is not installed."""
    return next((found for name in QEMU if (found := shutil.which(name))), None)


def tree_of(target: Target) -> Path:
    """The folder of a target's Debian tree."""
    return Path(target.cache).expanduser() / TREE


def find_python(tree: Path) -> Path | None:
    """The Python of a tree, None if it has none."""
    found = sorted(tree.glob("usr/bin/python3.*[0-9]"))
    return found[-1] if found else None


def command(qemu: str, tree: Path, *args: str) -> list[str]:
    """A command line that runs the tree's Python. Absolute paths are looked up first in the tree, then on this machine."""
    python = find_python(tree)
    assert python is not None, tree
    return [qemu, "-cpu", CPU, "-L", str(tree), str(python), *args]


def environment(tree: Path) -> dict[str, str]:
    """This process's environment without the variables that point programs to this machine's libraries."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "LD_"))}
    return {**kept, "PYTHONPATH": str(tree / SITE), "PYTHONNOUSERSITE": "1", "PYTHONDONTWRITEBYTECODE": "1"}


class EmulatedDevice(PythonDevice):
    """This machine as an emulated ARM device."""

    emulated = True

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        qemu = find_qemu()
        if qemu is None:
            raise UserError(f"{target.name}: {QEMU[0]} is not installed here", f"on Debian: {DEBIAN}")
        self._tree = tree_of(target)
        if find_python(self._tree) is None:
            raise UserError(f"{target.name}: there is no Debian tree with Python for ARM in {self._tree}",
                            f"llmc target setup {target.name} --install")
        self._qemu = qemu
        self._folder = tempfile.TemporaryDirectory(prefix="llmc-agent-")
        self._zip = agent.write(Path(self._folder.name))

    def _copy(self, artifact: Path) -> str:
        return str(artifact.resolve())

    def _agent(self) -> subprocess.Popen[str]:
        return subprocess.Popen(command(self._qemu, self._tree, str(self._zip)), env=environment(self._tree),
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def _install_hint(self, executable: str, absent: list[str]) -> str:
        return f"llmc target setup {self.target.name} --install"

    def close(self) -> None:
        self._folder.cleanup()
