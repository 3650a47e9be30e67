"""How fast this machine copies memory: the ceiling of decoding, which reads every weight once a token."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

BYTES = 256 << 20  # well past any cache
REPETITIONS = 5


def copy_bandwidth(threads: int) -> float:
    """Bytes read plus bytes written per second by the best of five copies of 256 MB, cut into `threads` slices."""
    source = np.ones(BYTES // 8)
    target = np.zeros_like(source)
    slices = list(zip(np.array_split(source, threads), np.array_split(target, threads), strict=True))
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:  # numpy copies without the interpreter lock
        for _ in range(REPETITIONS + 1):  # the first one also maps the pages; it is never the best
            start = time.perf_counter()
            list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), slices))
            best = min(best, time.perf_counter() - start)
    return 2 * BYTES / best
