"""`python -m llmc.runtimes.on_device.facts '{}'`: print the facts of this machine as one JSON line.

It is a separate process because a BLAS library reads its number of threads when numpy loads it.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from typing import Any

from llmc.runtimes.on_device.answers import answers, say

ONE_THREAD = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS", "BLIS_NUM_THREADS")


def facts() -> dict[str, Any]:
    """machine.describe() and measurements: read_bandwidth (bytes/s), matmul_flops (per second), probed (time, UTC); gpus."""
    from llmc import machine
    from llmc.runtimes.on_device import gpus, probe

    known = machine.describe()
    threads = known["usable_cores"]
    return {**known, "gpus": gpus.gpus(), "read_bandwidth": probe.read_bandwidth(threads),
            "matmul_flops": probe.matmul_flops(threads), "probed": datetime.now(UTC).isoformat(timespec="seconds")}


def main() -> None:
    os.environ.update(dict.fromkeys(ONE_THREAD, "1"))
    with answers() as out:
        say(out, facts())


if __name__ == "__main__":
    main()
