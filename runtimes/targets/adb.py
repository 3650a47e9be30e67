"""An Android device over adb, which has a shell and no Python: `llama-bench` of llama.cpp measures there.

Copies go through the same cache as over ssh (transfer.py): `adb shell -T` passes bytes and exit codes as they are, from
Android 7 on. The dialogue of runtimes/on_device/bench.py is held by adb_child.py, a process of this machine.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from llmc.errors import UserError
from llmc.formats.artifacts.table import format_of
from llmc.runtimes.targets.shell import command_line, run
from llmc.runtimes.targets.target import ADB, Target
from llmc.runtimes.targets.transfer import Cache

CACHE = "/data/local/tmp/llmc"  # where Android lets adb run programs; for targets that name no other
ENGINE = "llama-bench"
INSTALL = "sudo apt-get install adb, or Android's platform-tools"
FIND = """
for f in "$1/bin/llama-bench" /data/local/tmp/llama-bench "$(command -v llama-bench)"; do
  if [ -x "$f" ]; then echo "$f"; exit; fi
done
"""
PUT = """
cd "$1" && mkdir -p bin && cp "$2" bin/.new && chmod 755 bin/.new && mv bin/.new bin/llama-bench
"""
# What there is of a machine's facts without a program of llmc's: key=value lines, then /proc/cpuinfo.
FACTS = """
echo "system=$(uname -s -r -m)"; echo "machine=$(uname -m)"
echo "model=$(getprop ro.product.manufacturer 2>/dev/null) $(getprop ro.product.model 2>/dev/null)"
echo "soc=$(getprop ro.soc.manufacturer 2>/dev/null) $(getprop ro.soc.model 2>/dev/null)"
echo "cores=$(nproc)"; echo "kilobytes=$(grep MemTotal /proc/meminfo | tr -dc 0-9)"
echo "governor=$(cat /sys/devices/system/cpu/cpu0/cpufreq/scaling_governor 2>/dev/null)"
echo "battery=$(cat /sys/class/power_supply/battery/status 2>/dev/null)"
cat /proc/cpuinfo
"""


class AdbShell:
    """The shell of an Android device; the serial is an argument of adb, never part of a script."""

    def __init__(self, name: str, serial: str) -> None:
        self.name, self.serial = name, serial
        if shutil.which("adb") is None:
            raise UserError(f"{name}: there is no adb here", INSTALL)

    def popen(self, script: str, *args: str, **how: Any) -> subprocess.Popen[Any]:
        return subprocess.Popen(["adb", "-s", self.serial, "shell", "-T", command_line(script, *args)], **how)


def connected(target: Target) -> AdbShell:
    """The shell of a target that answers, or a UserError that says what adb says."""
    found = ADB.fullmatch(target.address)
    assert found is not None, target.address
    shell = AdbShell(target.name, found["serial"])
    done = subprocess.run(["adb", "-s", shell.serial, "get-state"], capture_output=True, text=True, check=False)
    if done.returncode or done.stdout.strip() != "device":
        said = (done.stderr or done.stdout).strip().splitlines()
        raise UserError(f"{target.name}: {said[-1] if said else 'adb does not answer'}",
                        "allow USB debugging on the device, and see that `adb devices` calls it `device`")
    return shell


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
        """bench_child and probe_child are played by adb_child.py; nothing else can be run without Python."""
        given = {"module": module, "target": self.target.name, "serial": self.serial, **job}
        if module == "llmc.runtimes.on_device.bench":
            given["engine"] = self.engine()
            if given["engine"] is None:
                raise UserError(f"{self.target.name} has no {ENGINE}", "build llama.cpp for Android, then: "
                                f"llmc target setup {self.target.name} --llama-bench PATH (see docs/devices.md)")
        elif module != "llmc.runtimes.on_device.facts":
            raise UserError(f"{self.target.name} is an Android device without Python: it can be benched and probed, no more",
                            "evaluate the file here, or on emulated-arm64 for ARM's arithmetic")
        return subprocess.Popen([sys.executable, "-m", "llmc.runtimes.targets.adb_child", json.dumps(given)],
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def close(self) -> None:
        self.cache.close()


def facts(shell: AdbShell) -> dict[str, Any]:
    """The facts of this_machine.describe(), as far as a shell can tell them."""
    from llmc.machine import FEATURES

    text = run(shell, FACTS)[1]
    told = dict(re.findall(r"^(\w+)=(.*)$", text, re.M))
    features = re.search(r"^(?:Features|flags)\s*: (.*)$", text, re.M)
    cores = int(told["cores"])
    battery = {"Discharging": "battery", "": None}.get(told["battery"].strip(), "ac")
    return {"system": told["system"], "machine": told["machine"],
            "cpu": told["soc"].strip() or told["model"].strip() or told["machine"], "physical_cores": cores,
            "logical_cores": cores, "usable_cores": cores,
            "cpu_features": sorted(FEATURES & set(features[1].split())) if features else [],
            "memory": int(told["kilobytes"]) * 1024, "governor": told["governor"].strip() or None, "temperature_c": None,
            "power": battery, "gpus": []}
