"""The host's side of the protocol with a process that runs one artifact on a device (runtimes/on_device/bench.py)."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from llmc.errors import UserError
from llmc.runtimes.on_device import bench as there
from llmc.runtimes.targets.device import Device, ended


class Child:
    """One artifact in its own process. `loaded` is the first answer of the process.

    placed: path of the artifact on the device. job: the other settings, see runtimes/on_device/bench.py.
    """

    def __init__(self, device: Device, artifact: Path, placed: str, job: dict[str, Any]) -> None:
        self.artifact = artifact
        self.where = "" if device.target.address.startswith("local-") else f" on {device.target.name}"
        self.process = device.start(there.__name__, {"artifact": placed, **job})

    def __enter__(self) -> Child:
        try:
            self.loaded = self._answer()
        except BaseException:  # __exit__ is not called when __enter__ fails
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()

    def ask(self, command: str, **values: Any) -> dict[str, Any]:
        """Send a command and return its answer. Raises UserError if the process ended or reports a problem."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # the process has ended: _answer raises the error
            self.process.stdin.write(json.dumps({"do": command, **values}) + "\n")
            self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise ended(self.process, self.artifact, self.where)
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError as e:
            raise UserError(f"the process that ran {self.artifact.name}{self.where} sent an answer that is not JSON: "
                            f"{line.strip()[:200]!r}",
                            "see its message above") from e
        if "problem" in answer:
            raise UserError(answer["problem"], answer["hint"])
        return answer
