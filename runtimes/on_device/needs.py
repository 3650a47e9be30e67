"""The packages of a device: `python -m llmc.runtimes.on_device.needs {}` prints one JSON line. Standard library only."""

from __future__ import annotations

import importlib
import json
import sys
from importlib import metadata
from pathlib import Path

from llmc.formats.artifacts.table import FORMATS
from llmc.privacy import telemetry_off

MODULES = {package: module for kind in FORMATS for package, module in kind.packages.items()}


def examine() -> dict[str, str | None]:
    """{package: its version, or None if it is absent or does not load}."""
    telemetry_off()
    found: dict[str, str | None] = {}
    for package, module in MODULES.items():
        try:
            importlib.import_module(module)
            found[package] = metadata.version(package)
        except (ImportError, OSError, RuntimeError):  # absent, or its shared library does not load
            found[package] = None
    return found


def main() -> None:
    print(json.dumps({"python": sys.version.split()[0], "executable": str(Path(sys.executable)), "packages": examine()}))


if __name__ == "__main__":
    main()
