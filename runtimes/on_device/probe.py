"""What bounds an LLM on a machine: how fast memory is read (decoding reads every weight once a token) and how fast matrices
are multiplied (prefill). numpy alone, so that it runs on any device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

BYTES = 256 << 20  # well past most caches
COLUMNS = 4096
SIDE = 1024  # of the matrices that are multiplied, a pair for each thread
REPETITIONS = 5


def read_bandwidth(threads: int) -> float:
    """Bytes read per second by the best of five products of a float32 matrix of 256 MB with a vector, the rows cut into one
    part for each thread: weights are read as decoding reads them."""
    matrix = np.ones((BYTES // 4 // COLUMNS, COLUMNS), np.float32)
    vector = np.ones(COLUMNS, np.float32)
    return matrix.nbytes / _best(lambda part: part @ vector, np.array_split(matrix, threads))


def matmul_flops(threads: int) -> float:
    """Float32 operations per second of the best of five rounds of matrix products, one in each thread."""
    pairs = [np.ones((SIDE, SIDE), np.float32) for _ in range(threads)]
    return threads * 2 * SIDE**3 / _best(lambda m: m @ m, pairs)


def _best(work: Callable[[np.ndarray], object], parts: Sequence[np.ndarray]) -> float:
    """Seconds in which all parts are worked on at once, the least of some rounds. numpy works without the interpreter lock;
    its BLAS must have one thread of its own (see probe_child)."""
    best = float("inf")
    with ThreadPoolExecutor(len(parts)) as pool:
        for _ in range(REPETITIONS + 1):  # the first one also wakes the threads
            start = time.perf_counter()
            list(pool.map(work, parts))
            best = min(best, time.perf_counter() - start)
    return best
