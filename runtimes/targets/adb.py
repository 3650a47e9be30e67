"""An Android device over adb. It has a shell but no Python, so llama.cpp's `llama-bench` measures there.

Files are copied into the same cache as over ssh (transfer.py): from Android 7 on, `adb shell -T` does not change bytes and
exit codes. adb_bench.py, a process on this machine, speaks the protocol of runtimes/on_device/bench.py.
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

CACHE = "/data/local/tmp/llmc"  # the default cache: Android lets adb run programs there
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
        cache = CACHE if target.cache.startswith("~") else target.cache  # Android's shell has no home folder
        self.cache = Cache(self._shell, cache, int(target.cache_gb * 1e9))

    def place(self, artifact: Path) -> str:
        kind = format_of(artifact)
        if kind is None or kind.format != "gguf":
            raise UserError(f"{artifact} is not a .gguf file; on Android llmc runs only those",
                            "write one with `llmc export --format gguf`")
        return self.cache.place(artifact)

    def engine(self) -> str | None:
        """The path of llama-bench on the device, None if there is none."""
        return run(self._shell, FIND, self.cache.root)[1].strip() or None

    def put_engine(self, program: Path) -> None:
        """Copy a llama-bench that was built for the device to the path where `engine` looks first."""
        run(self._shell, PUT, self.cache.root, self.cache.place(program))

    def has(self) -> dict[str, Any]:
        """{python, executable, packages}, like those of a device with Python."""
        found = self.engine()
        return {"python": "no Python is needed", "executable": self.serial, "packages": {ENGINE: found}}

    @property
    def serial(self) -> str:
        return self._shell.serial

    def start(self, module: str, job: dict[str, Any]) -> subprocess.Popen[str]:
        """Start adb_bench.py in place of on_device/bench.py or facts.py. Other modules need Python on the device."""
        given = {"module": module, "target": self.target.name, "serial": self.serial, **job}
        if module == bench.__name__:
            given["engine"] = self.engine()
            if given["engine"] is None:
                raise UserError(f"{self.target.name} has no {ENGINE}", "build llama.cpp for Android, then: "
                                f"llmc target setup {self.target.name} --llama-bench PATH (see docs/devices.md)")
        elif module != facts.__name__:
            raise UserError(f"{self.target.name} is an Android device without Python: llmc can only bench and probe it",
                            "evaluate the file here, or on emulated-arm64 for ARM's arithmetic")
        return subprocess.Popen([sys.executable, "-m", adb_bench.__name__, json.dumps(given)],
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def close(self) -> None:
        self.cache.close()
