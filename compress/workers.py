"""Workers: threads that share the batches of a job, each with its own part of torch's threads.

Most operations of a small model are too short to split well over threads, so on a processor two batches side by side run
faster than one batch on two threads. Who gets which batch does not depend on timing: the same thread count gives the same
sums to the last bit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

import torch


def share(workers: int, job: Callable[[int], Iterator[None]]) -> None:
    """Run job(0) … job(workers - 1) to their ends, side by side. Where one raises, or on Ctrl-C, the others stop after the
    step they are in (a step ends with a `yield`), and the error is raised here. Without gradients."""
    threads, stop = torch.get_num_threads(), threading.Event()

    def work(worker: int) -> None:
        torch.set_num_threads(max(1, threads // workers))  # of this thread
        with torch.no_grad():
            for _ in job(worker):
                if stop.is_set():
                    return

    if workers == 1:
        for _ in job(0):
            pass
        return
    try:
        with ThreadPoolExecutor(workers, thread_name_prefix="llmc-worker") as pool:
            parts = [pool.submit(work, k) for k in range(workers)]
            try:
                wait(parts, return_when=FIRST_EXCEPTION)
            finally:  # all are done, or one has failed, or Ctrl-C came, which reaches this thread only
                stop.set()
        for part in parts:
            part.result()
    finally:
        torch.set_num_threads(threads)  # the workers' setting is also the one of threads that start later
