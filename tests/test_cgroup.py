"""The limits of control groups, on made-up files of both versions."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from llmc import cgroup, machine
from llmc.cli import run
from llmc.errors import UserError

GIB = 1 << 30


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No limits: an empty /sys/fs/cgroup."""
    monkeypatch.setattr(cgroup, "ROOT", tmp_path / "cgroup")
    monkeypatch.setattr(cgroup, "OWN", tmp_path / "own")
    (tmp_path / "cgroup").mkdir()
    return tmp_path


def write(root: Path, own: str, files: dict[str, str]) -> None:
    (root / "own").write_text(own)
    for name, text in files.items():
        path = root / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


def limits() -> tuple[float | None, int | None, int | None]:
    return cgroup.cpus(), cgroup.memory(), cgroup.free_memory()


def test_no_groups_and_no_limits(root: Path) -> None:
    assert limits() == (None, None, None)
    write(root, "0::/a\n", {"cpu.max": "max 100000", "a/cpu.max": "max 100000", "a/memory.max": "max"})
    assert limits() == (None, None, None)
    write(root, "4:memory:/\n3:cpu,cpuacct:/\n", {
        "memory/memory.limit_in_bytes": "9223372036854771712", "cpu,cpuacct/cpu.cfs_quota_us": "-1",
        "cpu,cpuacct/cpu.cfs_period_us": "100000"})
    assert limits() == (None, None, None)


def test_version_2(root: Path) -> None:
    """The tightest limit of the group and of those above it."""
    write(root, "0::/slice/job\n", {
        "slice/job/cpu.max": "250000 100000", "slice/cpu.max": "150000 100000", "slice/job/memory.max": str(8 * GIB),
        "slice/memory.max": str(4 * GIB), "slice/memory.current": str(3 * GIB),
        "slice/memory.stat": f"anon {GIB}\ninactive_file {2 * GIB}\nactive_file 5", "slice/job/memory.current": str(GIB)})
    assert limits() == (1.5, 4 * GIB, 3 * GIB)


def test_version_2_in_a_container_that_sees_its_own_top(root: Path) -> None:
    write(root, "0::/docker/of/the/host\n", {"cpu.max": "200000 100000", "memory.max": str(2 * GIB), "memory.current": "0"})
    assert limits() == (2.0, 2 * GIB, 2 * GIB)


@pytest.mark.parametrize("name", ["cpu,cpuacct", "cpu"])
def test_version_1(root: Path, name: str) -> None:
    """The folder is called after all its controllers, or after one."""
    write(root, "12:memory:/job\n5:cpu,cpuacct:/job\n2:freezer:/\n0::/\n", {
        f"{name}/job/cpu.cfs_quota_us": "50000", f"{name}/job/cpu.cfs_period_us": "100000",
        "memory/job/memory.limit_in_bytes": str(GIB), "memory/memory.limit_in_bytes": "9223372036854771712",
        "memory/job/memory.usage_in_bytes": str(GIB // 2), "memory/job/memory.stat": f"total_inactive_file {GIB // 4}"})
    assert limits() == (0.5, GIB, GIB * 3 // 4)


def test_the_machine_counts_them(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(machine, "_cores", lambda: 8)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert machine.physical_cores() == 8
    assert machine.memory() == pytest.approx(psutil.virtual_memory().total, rel=0.01)
    for quota, cores in (("250000", 2), ("100000", 1), ("50000", 1), ("9900000", 8)):
        write(root, "0::/\n", {"cpu.max": f"{quota} 100000"})
        assert machine.physical_cores() == cores
    write(root, "0::/\n", {"memory.max": "3000000", "memory.current": "1000000"})
    assert (machine.memory(), machine.free_memory()) == (3_000_000, 2_000_000)
    machine.check_memory(2_000_000, "it")
    with pytest.raises(UserError, match=r"it needs about 2\.0 MB of memory and 2\.0 MB is free"):
        machine.check_memory(2_000_001, "it")


@pytest.mark.parametrize(("arguments", "option"), [
    (["export", "x", "-o", "y"], "a machine with more memory"), (["quantize", "x"], "--samples"),
    (["eval", "x"], "--context"),
    (["heal", "x", "--teacher", "y"], "--checkpointing"), (["--quiet", "bench", "x"], "--depth"),
])
@pytest.mark.parametrize("error", [MemoryError(), OSError(12, "Cannot allocate memory"), RuntimeError("std::bad_alloc")])
def test_out_of_memory_names_an_option_of_the_command(arguments: list[str], option: str, error: BaseException,
                                                      monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*args: object, **more: object) -> None:
        raise error

    monkeypatch.setattr("llmc.cli.app", fails)
    assert run(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error: out of memory"
    assert option in lines[1]
    assert ("--samples" in lines[1]) == (arguments[0] == "quantize")
