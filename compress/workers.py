"""Workers: threads that share the batches of a job. Each worker uses a part of torch's threads.

Most operations of a small model are too short to split well over threads. On a CPU, two batches in parallel are therefore
faster than one batch on two threads. The batches of a worker do not depend on timing: the same number of threads gives the
same sums bit for bit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

import torch

from llmc.machine import give_back


def share(workers: int, job: Callable[[int], Iterator[None]]) -> None:
    """Run job(0) … job(workers - 1) in parallel to their ends, without gradients. If one raises, or on Ctrl-C, the others
    stop after their present step (a step ends with a `yield`), and the error is raised here."""
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
            finally:  # all are done, one has failed, or Ctrl-C was pressed (only this thread gets it)
                stop.set()
        for part in parts:
            part.result()
    finally:
        give_back()  # each job has threads of its own, and what they freed stays with them
        torch.set_num_threads(threads)  # later threads would inherit the workers' setting
