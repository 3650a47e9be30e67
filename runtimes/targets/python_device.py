"""A device with a Python that runs llmc's agent (agent.py): the common part of ssh and emulated devices."""

from __future__ import annotations

import json
import shlex
import subprocess
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from llmc.errors import UserError
from llmc.formats.artifacts.table import FORMATS, format_of
from llmc.runtimes.on_device import needs
from llmc.runtimes.targets.target import Target


class PythonDevice(ABC):
    """A device (see device.py). Before it runs an artifact, it checks that the device has the artifact's runtime."""

    emulated = False

    def __init__(self, target: Target) -> None:
        self.target = target
        self._has: dict[str, Any] | None = None
        self._packages: dict[str, list[str]] = {}  # packages for each placed artifact

    def place(self, artifact: Path) -> str:
        """The artifact's path on the device. It stores the packages that `start` checks for this path."""
        kind = format_of(artifact)
        if kind is not None and not kind.packages:
            runs = " and ".join(k.plural for k in FORMATS if k.packages)
            raise UserError(f"{artifact} is {kind.label} for torch; {self.target.name} runs {runs}",
                            "write one with `llmc export --format gguf` or `--format onnx`")
        placed = self._copy(artifact)
        self._packages[placed] = [] if kind is None else list(kind.packages)
        return placed

    @abstractmethod
    def _copy(self, artifact: Path) -> str:
        """The artifact's path on the device. It is copied there first if needed."""

    @abstractmethod
    def close(self) -> None:
        """End the connection."""

    @abstractmethod
    def _agent(self) -> subprocess.Popen[str]:
        """Start the agent on the device, with pipes as its stdin and stdout."""

    @abstractmethod
    def _install_hint(self, executable: str, absent: list[str]) -> str:
        """The hint for missing packages."""

    def start(self, module: str, job: dict[str, Any]) -> subprocess.Popen[str]:
        if artifact := job.get("artifact"):
            kind = format_of(Path(artifact))  # by its name: what was not placed here is of that format too
            self._check(self._packages.get(artifact, list(kind.packages) if kind else []))
        return self._start(module, job)

    def _start(self, module: str, job: dict[str, Any]) -> subprocess.Popen[str]:
        process = self._agent()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps({"module": module, "job": job}) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: the caller sees its exit code and that there is no answer
        return process

    def has(self) -> dict[str, Any]:
        """{python, executable, packages} as needs.py finds them there."""
        if self._has is None:
            out, _ = (process := self._start(needs.__name__, {})).communicate()
            if process.returncode in (126, 127):
                raise UserError(f"{self.target.name} has no {self.target.python}",
                                "install Python 3.11 or newer there, or name it in targets.toml: python = \"/path\"")
            found: dict[str, Any] = json.loads(out or "{}")
            if "packages" not in found:
                raise UserError(
                    f"{self.target.name}: " + found.get("problem", f"its Python ended with exit code {process.returncode}"),
                    found.get("hint", "see its message above"))
            self._has = found
        return self._has

    def _check(self, packages: list[str]) -> None:
        found = self.has()
        absent = [p for p in packages if found["packages"][p] is None]
        if absent:
            raise UserError(
                f"{self.target.name}: {found['executable']} (Python {found['python']}) lacks {', '.join(absent)}",
                self._install_hint(found["executable"], absent))


def pip_install(executable: str, packages: list[str]) -> str:
    """The command that installs packages, quoted for a shell."""
    return shlex.join([executable, "-m", "pip", "install", *packages])
