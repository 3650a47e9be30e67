"""Find the fastest number of threads for an artifact on a device, by measurement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from llmc.console import progress
from llmc.evals.bench.host import Child
from llmc.evals.report.schema import Facts, ThreadPoint, ThreadSweep
from llmc.runtimes.targets.device import Device

REPETITIONS = 3


def candidates(cores: int, logical: int) -> list[int]:
    """Numbers of threads to try: 1 to 8, then in steps of 4, 8, 16, … up to `logical`; always `cores` and `logical`."""
    steps = [n for n in range(1, logical + 1) if n <= 8 or n % (1 << (n.bit_length() - 2)) == 0]
    return sorted({*steps, cores, logical})


def sweep(device: Device, artifact: Path, placed: str, ids: list[int], job: dict[str, Any], run: dict[str, Any],
          facts: Facts) -> ThreadSweep:
    """Speed by the number of threads, at the first prompt and depth. Each number runs in a new process, because a runtime
    fixes its threads when it loads."""
    prompt, depth = run["prompts"][0], run["depths"][0]
    command = {**run, "prompts": [prompt], "depths": [depth]}
    prefill: list[ThreadPoint] = []
    decode: list[ThreadPoint] = []
    tried = candidates(facts["usable_cores"], facts["logical_cores"] or facts["usable_cores"])
    with progress(f"threads for {artifact.name}", len(tried)) as p:
        for n in tried:
            with Child(device, artifact, placed, {**job, "threads": n}) as child:
                child.ask("ids", ids=ids)
                runs = [child.ask("run", **command) for _ in range(1 + REPETITIONS)][1:]
                child.ask("end")
            first = float(np.median([r["first_token_s"][str(prompt)] for r in runs]))
            seconds = float(np.median([r["decode_s"][str(depth)] for r in runs]))
            prefill.append({"threads": n, "median": prompt / first})
            decode.append({"threads": n, "median": run["generate"] / seconds})
            p.step(f"{n}: {run['generate'] / seconds:.1f} tokens/s")
    return {"prefill": prefill, "decode": decode, "best": {"prefill": _best(prefill), "decode": _best(decode)}}


def _best(points: list[ThreadPoint]) -> int:
    return max(points, key=lambda point: point["median"])["threads"]
