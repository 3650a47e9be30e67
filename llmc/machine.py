"""The machine that llmc runs on: facts that are needed to interpret a measured speed (on Linux from /proc and /sys)."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc import cgroup
from llmc.console import size
from llmc.errors import UserError

if TYPE_CHECKING:
    import torch


WINDOWS = os.name == "nt"
CPUS = Path("/sys/devices/system/cpu")
PI = "/sys/devices/platform/soc/soc:firmware/get_throttled"  # the lowest four bits of the flags are the present state
# The CPU features that decide which matrix kernels run. The others in /proc/cpuinfo are not needed.
FEATURES = {
    "sse4_1", "sse4_2", "ssse3", "avx", "avx2", "f16c", "fma", "bmi2", "avx_vnni",
    "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_vbmi", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_int8", "amx_bf16",
    "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme",
}


@cache
def _trim() -> Any:
    """glibc's `malloc_trim`; None with another C library."""
    import ctypes

    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None


def give_back() -> None:
    """Give freed memory back to the system. glibc keeps freed blocks below 32 MB for later, in each thread and in pieces,
    and more so with each layer. It takes milliseconds."""
    if trim := _trim():
        trim(0)


def physical_cores() -> int:
    """The cores that this process may use, without hyper-threads, within a container's quota. It is llmc's default number of
    threads."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup.cpus()
    return max(1, min(_cores() or allowed, allowed, allowed if quota is None else int(quota)))


def _cores() -> int | None:
    """The machine's cores, without hyper-threads. On Linux it does not need psutil, which a device may lack."""
    siblings = {_read(str(p)) for p in CPUS.glob("cpu[0-9]*/topology/thread_siblings_list")}
    if siblings - {""}:
        return len(siblings - {""})
    try:
        import psutil
    except ImportError:
        return os.cpu_count()
    return psutil.cpu_count(logical=False) or os.cpu_count()


def memory() -> int:
    """The bytes of RAM, or of a container's limit if that is less. Only on Windows, which has no sysconf, it needs psutil,
    which a device may lack."""
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        all_of_it = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return min(all_of_it, cgroup.memory() or all_of_it)
    try:
        import psutil
    except ImportError as e:
        raise UserError("only psutil can tell the memory of this machine", "pip install psutil") from e
    return int(psutil.virtual_memory().total)


def free_memory() -> int:
    """The bytes of memory that are free for this process, within a container's limit."""
    import psutil

    free, left = int(psutil.virtual_memory().available), cgroup.free_memory()
    return free if left is None else min(free, left)


def cpu_features() -> list[str]:
    """The CPU's instruction sets that are in FEATURES, sorted; empty if the system does not report them."""
    for line in _read("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return sorted(FEATURES & set(value.split()))
    return []


def cpu_model() -> str:
    """The CPU's name, such as 'Intel(R) Xeon(R) CPU @ 2.80GHz'."""
    for line in _read("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model"):
            return value.strip()
    board = _read("/proc/device-tree/model").strip("\0\n ")  # ARM systems report the board's name instead
    return board or platform.processor() or platform.machine()


def governor() -> str | None:
    """The kernel's policy for the CPU's frequency, such as 'performance'; None if the system does not report it."""
    return _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip() or None


def temperature() -> float | None:
    """The highest temperature of the CPU's sensors in degrees Celsius; None without sensors (virtual machines)."""
    zones = {z: _read(str(z / "type")).strip().lower() for z in Path("/sys/class/thermal").glob("thermal_zone*")}
    ours = [z for z, kind in zones.items() if any(word in kind for word in ("cpu", "pkg", "soc", "core", "tctl"))] or zones
    files = [z / "temp" for z in ours]
    for sensor in Path("/sys/class/hwmon").glob("hwmon*"):
        if _read(str(sensor / "name")).strip() in ("coretemp", "k10temp", "cpu_thermal", "zenpower"):
            files += sensor.glob("temp*_input")
    degrees = [int(t) / 1000 for f in files if (t := _read(str(f)).strip()).lstrip("-").isdigit()]
    return max(degrees, default=None)


def frequency() -> float | None:
    """The mean of the CPUs' present frequencies in MHz; None if the system does not report them."""
    kilohertz = [int(t) for p in CPUS.glob("cpu[0-9]*/cpufreq/scaling_cur_freq") if (t := _read(str(p)).strip()).isdigit()]
    return round(sum(kilohertz) / len(kilohertz) / 1000, 1) if kilohertz else None


def state() -> dict[str, Any]:
    """{mhz, temperature_c, throttle_events (since the start), throttled_now}; None for values that are not reported."""
    counts = [int(t) for p in CPUS.glob("cpu[0-9]*/thermal_throttle/*_throttle_count")
              if (t := _read(str(p)).strip()).isdigit()]
    flags = _read(PI).strip()
    return {"mhz": frequency(), "temperature_c": temperature(), "throttle_events": sum(counts) if counts else None,
            "throttled_now": bool(int(flags, 16) & 0xF) if flags else None}


def power() -> str | None:
    """'ac' or 'battery'; None if the system does not report it."""
    states = {(_read(str(p / "type")).strip(), _read(str(p / "online")).strip(), _read(str(p / "status")).strip())
              for p in Path("/sys/class/power_supply").glob("*")}
    if any(kind in ("Mains", "USB") and online == "1" for kind, online, _ in states):
        return "ac"
    if any(kind == "Battery" and status == "Discharging" for kind, _, status in states):
        return "battery"
    return "ac" if any(kind == "Battery" for kind, _, _ in states) else None


def load_average() -> list[float] | None:
    """Runnable processes, averaged over 1, 5 and 15 minutes: a busy machine gives wrong speeds."""
    return [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None


def peak_rss() -> int:
    """The peak memory of this process, in bytes.

    On Linux it is VmHWM, because ru_maxrss of a new process starts with its parent's memory at the fork.
    """
    for line in _read("/proc/self/status").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def describe() -> dict[str, Any]:
    """The facts that need no measurement. Memory is in bytes."""
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}", "machine": platform.machine(),
        "cpu": cpu_model(), "physical_cores": _cores(), "logical_cores": os.cpu_count(), "usable_cores": physical_cores(),
        "cpu_features": cpu_features(), "memory": memory(), "governor": governor(), "temperature_c": temperature(),
        "power": power(),
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError):  # absent, not readable, or without an answer
        return ""


def check_memory(needed: int, what: str, instead: str = "") -> None:
    """Raise UserError if less than `needed` bytes of memory are free. instead: an alternative, for the hint."""
    free = free_memory()
    if free < needed:
        raise UserError(f"{what} needs about {size(needed)} of memory and {size(free)} is free",
                        "close other programs" + (f", or {instead}" if instead else ""))


def torch_device(device: str) -> torch.device:
    """The torch device for 'cpu', for 'gpu' (the accelerator that torch finds) or for a torch device name."""
    import torch

    if device != "gpu":
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    raise UserError("--device gpu: torch finds no GPU here", "use --device cpu, or install a torch built for your GPU")
