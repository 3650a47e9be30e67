"""The shell of an Android device over adb, and the facts that it can read."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import Any

from llmc.errors import UserError
from llmc.machine import FEATURES
from llmc.runtimes.targets.shell import command_line, run
from llmc.runtimes.targets.target import ADB, Target

INSTALL = "sudo apt-get install adb, or Android's platform-tools"
# Prints the machine's facts that a shell can read: key=value lines, then /proc/cpuinfo.
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
            raise UserError(f"{name}: adb is not installed here", INSTALL)

    def popen(self, script: str, *args: str, **how: Any) -> subprocess.Popen[Any]:
        return subprocess.Popen(["adb", "-s", self.serial, "shell", "-T", command_line(script, *args)], **how)


def connected(target: Target) -> AdbShell:
    """The shell of a target; raises UserError, with adb's message, if the target does not answer."""
    found = ADB.fullmatch(target.address)
    assert found is not None, target.address
    shell = AdbShell(target.name, found["serial"])
    done = subprocess.run(["adb", "-s", shell.serial, "get-state"], capture_output=True, text=True,
                          errors="replace", check=False)
    if done.returncode or done.stdout.strip() != "device":
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise UserError(f"{target.name}: {lines[-1] if lines else 'adb does not answer'}",
                        "allow USB debugging on the device, and check that `adb devices` lists it as `device`")
    return shell


def facts(shell: AdbShell) -> dict[str, Any]:
    """The facts of llmc.machine.describe() that a shell can read."""
    text = run(shell, FACTS)[1]
    found = dict(re.findall(r"^(\w+)=(.*)$", text, re.M))
    features = re.search(r"^(?:Features|flags)\s*: (.*)$", text, re.M)
    cores = int(found["cores"])
    battery = {"Discharging": "battery", "": None}.get(found["battery"].strip(), "ac")
    return {"system": found["system"], "machine": found["machine"],
            "cpu": found["soc"].strip() or found["model"].strip() or found["machine"], "physical_cores": cores,
            "logical_cores": cores, "usable_cores": cores,
            "cpu_features": sorted(FEATURES & set(features[1].split())) if features else [],
            "memory": int(found["kilobytes"]) * 1024, "governor": found["governor"].strip() or None, "temperature_c": None,
            "power": battery, "gpus": []}
