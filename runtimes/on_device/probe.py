"""The two limits of an LLM on a machine: memory bandwidth (decoding reads every weight once for each token) and the speed of
matrix products (prefill). It needs only numpy, so it runs on any device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

BYTES = 256 << 20  # much larger than most caches
COLUMNS = 4096
SIDE = 1024  # rows and columns of the multiplied matrices, one pair for each thread
REPETITIONS = 5


def read_bandwidth(threads: int) -> float:
    """The memory bandwidth in bytes per second: the best of five products of a float32 matrix of 256 MB with a vector.

    Each thread has a part of the rows. So memory is read as in decoding."""
    matrix = np.ones((BYTES // 4 // COLUMNS, COLUMNS), np.float32)
    vector = np.ones(COLUMNS, np.float32)
    return matrix.nbytes / _best(lambda part: part @ vector, np.array_split(matrix, threads))


def matmul_flops(threads: int) -> float:
    """The float32 operations per second in the best of five rounds of matrix products, one product in each thread."""
    pairs = [np.ones((SIDE, SIDE), np.float32) for _ in range(threads)]
    return threads * 2 * SIDE**3 / _best(lambda m: m @ m, pairs)


def _best(work: Callable[[np.ndarray], object], parts: Sequence[np.ndarray]) -> float:
    """The seconds to work on all parts at once, the shortest of some rounds.

    numpy releases the interpreter lock. Its BLAS must be limited to one thread (see facts.py)."""
    best = float("inf")
    with ThreadPoolExecutor(len(parts)) as pool:
        for _ in range(REPETITIONS + 1):  # the first one also wakes the threads
            start = time.perf_counter()
            list(pool.map(work, parts))
            best = min(best, time.perf_counter() - start)
    return best
