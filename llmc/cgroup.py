"""The limits that a container or a service has on Linux: control groups, version 2 and version 1.

A process is in one group for each controller. A limit of any group above it counts too. On other systems, and without limits,
each function returns None.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
UNLIMITED = 1 << 60  # version 1 writes a number near 2**63 for "no limit"


def cpus() -> float | None:
    """The CPUs that the quota allows, such as 1.5."""
    found = []
    for folder in _groups("cpu"):
        quota, _, period = _read(folder / "cpu.max").partition(" ")  # version 2: 'max 100000' or '150000 100000'
        if not quota:
            quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period):  # not 'max', and not version 1's -1
            found.append(int(quota) / int(period))
    return min(found, default=None)


def memory() -> int | None:
    """The bytes of memory that the process and the others of its group may use."""
    return min((limit for _, limit in _limits()), default=None)


def free_memory() -> int | None:
    """The bytes of that memory that are free. Cached files that can be dropped count as free."""
    found = []
    for folder, limit in _limits():
        used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes") or 0
        stat = dict(line.split(" ", 1) for line in _read(folder / "memory.stat").splitlines() if " " in line)
        cached = int(stat.get("total_inactive_file", stat.get("inactive_file", "0")))
        found.append(max(0, limit - max(0, used - cached)))
    return min(found, default=None)


def _limits() -> Iterator[tuple[Path, int]]:
    """(folder, bytes) of each group that has a limit of memory."""
    for folder in _groups("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            limit = _number(folder / name)
            if limit is not None and limit < UNLIMITED:
                yield folder, limit


def _groups(controller: str) -> Iterator[Path]:
    """The folders of the process's group of a controller and of the groups above it. Inside a container the path in
    /proc/self/cgroup may be that of the host; then only the top is there."""
    for line in _read(OWN).splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        controllers = names.split(",")
        if names and controller not in controllers:
            continue
        tops = [ROOT / names, ROOT / controller] if names else [ROOT]
        top = next((t for t in tops if t.is_dir()), None)
        if top is None:
            continue
        group = top / path.lstrip("/")
        while True:
            if group.is_dir():
                yield group
            if group == top or top not in group.parents:
                break
            group = group.parent


def _number(path: Path) -> int | None:
    text = _read(path)
    return int(text) if text.isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):  # another system, no such controller, or not readable
        return ""
