"""`llmc target setup` and `clean`: install the packages that artifacts need on a device, and clean its cache."""

from __future__ import annotations

from contextlib import closing
from importlib import metadata
from pathlib import Path
from typing import Any

from llmc.errors import UserError
from llmc.formats.artifacts.table import FORMATS
from llmc.runtimes.targets.target import ADB, EMULATED, LOCAL, SSH, Target


def wanted(runtimes: tuple[str, ...]) -> list[str]:
    """The packages of the runtimes ('gguf', 'onnx'), in this machine's versions, so that results can be compared."""
    packages = {kind.format: kind.packages for kind in FORMATS if kind.packages}
    if unknown := set(runtimes) - packages.keys():
        raise UserError(f"--runtime {','.join(sorted(unknown))} is not known", f"choose from {', '.join(packages)}")
    names = dict.fromkeys(name for r in runtimes for name in packages[r])
    return [_pinned(name) for name in names]


def _pinned(package: str) -> str:
    if package == "numpy":  # any version: no result depends on it
        return package
    try:
        return f"{package}=={metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return package


def setup(target: Target, install: bool, runtimes: tuple[str, ...], llama_bench: Path | None = None) -> dict[str, Any]:
    """Install the missing packages if `install`; return {target, python, executable, packages} of the device.

    llama_bench: a program for an Android device, which is copied there."""
    packages = wanted(runtimes)
    if target.address in LOCAL:
        raise UserError(f"{target.name} is this machine", "llmc doctor shows what it has and how to install the rest")
    if ADB.fullmatch(target.address):
        from llmc.runtimes.targets.adb import AdbDevice

        with closing(AdbDevice(target)) as phone:
            if llama_bench is not None:
                phone.put_engine(llama_bench)
            return {"target": target.name, **phone.has()}
    if llama_bench is not None:
        raise UserError(f"--llama-bench is for Android; {target.name} runs artifacts in Python", "use --install")
    if target.address == EMULATED and install:
        from llmc.runtimes.targets import emulated_setup

        emulated_setup.install(target, packages)
    from llmc.runtimes.targets.device import connect
    from llmc.runtimes.targets.python_device import PythonDevice
    from llmc.runtimes.targets.ssh import SshDevice

    with closing(connect(target)) as device:
        if install and isinstance(device, SshDevice):
            device.install(packages)
        assert isinstance(device, PythonDevice)
        return {"target": target.name, **device.has()}


def clean(target: Target) -> tuple[int, int]:
    """Remove every artifact that is not in use from a device's cache; return the bytes (removed, left)."""
    if not (SSH.fullmatch(target.address) or ADB.fullmatch(target.address)):
        raise UserError(f"{target.name} runs artifacts in place and has no cache of copies", "nothing to do")
    from llmc.runtimes.targets.device import connect

    with closing(connect(target)) as device:
        cache: Any = getattr(device, "cache", None)
        cache.close()  # release the agent that this connection copied
        removed, left = cache.clean()
    return removed, left
