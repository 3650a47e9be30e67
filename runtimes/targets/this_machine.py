"""The machine that llmc runs on: the facts without which a measured speed means nothing (on Linux from /proc, /sys)."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

# What decides which matrix kernels run; everything else in /proc/cpuinfo is noise here.
FEATURES = {
    "sse4_1", "sse4_2", "ssse3", "avx", "avx2", "f16c", "fma", "bmi2", "avx_vnni",
    "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_vbmi", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_int8", "amx_bf16",
    "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme",
}


def physical_cores() -> int:
    """Cores that this process may use, hyper-threads not counted: the thread count llmc uses when none is given."""
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed))


def cpu_features() -> list[str]:
    """Instruction sets of interest that the CPU reports, sorted; empty where the system does not tell."""
    for line in _read("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return sorted(FEATURES & set(value.split()))
    return []


def cpu_model() -> str:
    """The CPU's name, e.g. 'Intel(R) Xeon(R) …'."""
    for line in _read("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model"):
            return value.strip()
    return platform.processor() or platform.machine()


def governor() -> str | None:
    """How the kernel chooses the CPU's frequency ('performance', 'powersave', …), None where it does not tell."""
    return _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip() or None


def load_average() -> list[float] | None:
    """Runnable processes, averaged over 1, 5 and 15 minutes: a busy machine gives wrong speeds."""
    return [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None


def peak_rss() -> int:
    """The most memory this process ever held, bytes.

    On Linux VmHWM, because ru_maxrss of a new process starts at what its parent held when it was forked.
    """
    for line in _read("/proc/self/status").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def describe() -> dict[str, Any]:
    """The facts that do not change while a benchmark runs. Memory in bytes."""
    import psutil

    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}", "cpu": cpu_model(),
        "physical_cores": psutil.cpu_count(logical=False), "logical_cores": os.cpu_count(),
        "usable_cores": physical_cores(), "cpu_features": cpu_features(), "memory": psutil.virtual_memory().total,
        "governor": governor(),
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
