"""Threads that share a job."""

from __future__ import annotations

import platform
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

from llmc.compress.workers import share


def test_every_part_runs_once_with_its_part_of_the_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    seen: dict[int, int] = {}

    def job(worker: int) -> Iterator[None]:
        seen[worker] = torch.get_num_threads()
        yield

    share(2, job)
    assert seen == {0: 2, 1: 2}
    assert torch.get_num_threads() == 4
    torch.set_num_threads(before)


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_is_raised_and_stops_the_other(failing: int) -> None:
    started = threading.Event()
    steps = 0

    def job(worker: int) -> Iterator[None]:
        nonlocal steps
        if worker == failing:
            assert started.wait(10)
            raise KeyError("of one")
        while True:  # ends only where it is stopped
            steps += 1
            started.set()
            yield

    with pytest.raises(KeyError, match="of one"):
        share(2, job)
    assert steps > 0


APART = """
import resource, torch
from llmc.compress.workers import share

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

kept = []

def job(worker):
    large = [torch.ones(1 << 20)]
    large.clear()  # from now on glibc keeps blocks of this size
    for _ in range(50):
        large.append(torch.ones(1 << 18))
        kept.append(torch.ones(500))
    yield

before = resident()
share(2, job)
print(len(kept), resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only there are freed blocks kept like this")
def test_what_threads_freed_is_given_back_to_the_system() -> None:
    """Small blocks that stay between large ones keep glibc from it. Apart: what else a process did decides what it keeps."""
    kept, more = map(int, subprocess.check_output([sys.executable, "-c", APART], text=True).split())
    assert kept == 100
    assert more < 40 << 20  # of 100 MB
