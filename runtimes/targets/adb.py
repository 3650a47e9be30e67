"""An Android device over adb, which has a shell and no Python: `llama-bench` of llama.cpp measures there.

Copies go through the same cache as over ssh (transfer.py): `adb shell -T` passes bytes and exit codes as they are, from
Android 7 on. The dialogue of runtimes/on_device/bench.py is held by adb_bench.py, a process of this machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from llmc.errors import UserError
from llmc.formats.artifacts.table import format_of
from llmc.runtimes.on_device import bench, facts
from llmc.runtimes.targets import adb_bench
from llmc.runtimes.targets.adb_shell import connected
from llmc.runtimes.targets.shell import run
from llmc.runtimes.targets.target import Target
from llmc.runtimes.targets.transfer import Cache

CACHE = "/data/local/tmp/llmc"  # where Android lets adb run programs; for targets that name no other
ENGINE = "llama-bench"
FIND = """
for f in "$1/bin/llama-bench" /data/local/tmp/llama-bench "$(command -v llama-bench)"; do
  if [ -x "$f" ]; then echo "$f"; exit; fi
done
"""
PUT = """
cd "$1" && mkdir -p bin && cp "$2" bin/.new && chmod 755 bin/.new && mv bin/.new bin/llama-bench
"""


class AdbDevice:
    """A device (see device.py) with an Android shell."""

    emulated = False

    def __init__(self, target: Target) -> None:
        self.target = target
        self._shell = connected(target)
        cache = CACHE if target.cache.startswith("~") else target.cache  # Android's shell has no home of its own
        self.cache = Cache(self._shell, cache, int(target.cache_gb * 1e9))

    def place(self, artifact: Path) -> str:
        kind = format_of(artifact)
        if kind is None or kind.format != "gguf":
            raise UserError(f"{artifact} is no .gguf file; llmc runs nothing else on Android",
                            "write one with `llmc export --format gguf`")
        return self.cache.place(artifact)

    def engine(self) -> str | None:
        """Where llama-bench is on the device."""
        return run(self._shell, FIND, self.cache.root)[1].strip() or None

    def put_engine(self, program: Path) -> None:
        """Copy a llama-bench that was built for the device to where `engine` looks first."""
        run(self._shell, PUT, self.cache.root, self.cache.place(program))

    def has(self) -> dict[str, Any]:
        """{python, executable, packages}, as of a device with Python."""
        found = self.engine()
        return {"python": "no Python is needed", "executable": self.serial, "packages": {ENGINE: found}}

    @property
    def serial(self) -> str:
        return self._shell.serial

    def start(self, module: str, job: dict[str, Any]) -> subprocess.Popen[str]:
        """adb_bench.py answers as on_device/bench.py and facts.py do; nothing else can be run without Python."""
        given = {"module": module, "target": self.target.name, "serial": self.serial, **job}
        if module == bench.__name__:
            given["engine"] = self.engine()
            if given["engine"] is None:
                raise UserError(f"{self.target.name} has no {ENGINE}", "build llama.cpp for Android, then: "
                                f"llmc target setup {self.target.name} --llama-bench PATH (see docs/devices.md)")
        elif module != facts.__name__:
            raise UserError(f"{self.target.name} is an Android device without Python: it can be benched and probed, no more",
                            "evaluate the file here, or on emulated-arm64 for ARM's arithmetic")
        return subprocess.Popen([sys.executable, "-m", adb_bench.__name__, json.dumps(given)],
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def close(self) -> None:
        self.cache.close()
