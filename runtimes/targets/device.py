"""A device: a connected target. Artifacts are placed there, and llmc's own modules run there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Protocol

from llmc.errors import UserError
from llmc.runtimes.on_device import facts as there
from llmc.runtimes.targets.target import ADB, LOCAL, SSH, Target


class Device(Protocol):
    """The interface of a device; `connect` returns one."""

    target: Target
    emulated: bool
    """True if its speeds are labelled as emulated and never compared."""

    def place(self, artifact: Path) -> str:
        """The artifact's path on the device. It is copied into the device's cache first if it is not there."""

    def start(self, module: str, job: dict[str, Any]) -> subprocess.Popen[str]:
        """Run `python -m MODULE JOB` on the device, JOB as JSON, with text pipes. The module is this llmc's own."""

    def close(self) -> None:
        """End the connection."""


class LocalDevice:
    """This machine."""

    emulated = False

    def __init__(self, target: Target) -> None:
        self.target = target

    def place(self, artifact: Path) -> str:
        return str(artifact)

    def start(self, module: str, job: dict[str, Any]) -> subprocess.Popen[str]:
        # -P: do not import a folder called llmc in the working folder
        return subprocess.Popen([sys.executable, "-P", "-m", module, json.dumps(job)], stdin=subprocess.PIPE,
                                stdout=subprocess.PIPE, text=True)

    def close(self) -> None:
        pass


def ended(process: subprocess.Popen[Any], artifact: Path, where: str) -> UserError:
    """The error for a process that ran an artifact and no longer answers. where: ' on pi', or '' for this machine."""
    code = process.wait()
    return UserError(f"the process that ran {artifact.name}{where} ended with "
                     + (f"signal {-code}" if code < 0 else f"exit code {code}"),
                     "see its message above; if there is none, memory may have run out")


def probed(device: Device) -> dict[str, Any]:
    """The facts of a device (see on_device/facts.py), measured now."""
    with device.start(there.__name__, {}) as child:
        out, _ = child.communicate()
    try:
        facts: dict[str, Any] = json.loads(out)
    except ValueError as e:
        raise UserError(f"target {device.target.name} could not be probed (exit code {child.returncode})",
                        "see its message above") from e
    return facts


def connect(target: Target) -> Device:
    """The device at a target's address; raises UserError if it cannot be reached."""
    if target.address in LOCAL:
        return LocalDevice(target)
    if SSH.fullmatch(target.address):
        from llmc.runtimes.targets.ssh import SshDevice

        return SshDevice(target)
    if ADB.fullmatch(target.address):
        from llmc.runtimes.targets.adb import AdbDevice

        return AdbDevice(target)
    from llmc.runtimes.targets.emulated import EmulatedDevice

    return EmulatedDevice(target)
