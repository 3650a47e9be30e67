"""The process that benches one artifact. It is a new process, so that load time and peak memory are those of the artifact.

It runs on the device: it needs numpy and the artifact's runtime, but no tokenizer. Its argument is the job, a JSON object
{artifact, context, threads (null: the physical cores), device, kv (null: the runtime's own)}. Its answers are JSON lines: one
after loading, then one for each line of stdin. A line of stdin is {"do": "ids", "ids": [..]} (the tokens to feed),
{"do": "run", "prompts": [..], "depths": [..], "generate": n} (one repetition), or {"do": "end"}.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from llmc.errors import UserError
from llmc.machine import load_average, peak_rss, physical_cores, state
from llmc.runtimes.base import Runtime
from llmc.runtimes.on_device.answers import answers, say
from llmc.runtimes.on_device.energy import Meter
from llmc.runtimes.open import load_library, open_runtime

READ_BYTES = 4 << 20


def main() -> None:
    job = json.loads(sys.argv[1])
    with answers() as out:
        def answer(**values: Any) -> None:
            say(out, values)

        try:
            _serve(job, answer)
        except UserError as e:
            answer(problem=e.problem, hint=e.hint)


def _serve(job: dict[str, Any], answer: Any) -> None:
    artifact = Path(job["artifact"]).expanduser()
    load_library(artifact)
    read_anew(artifact)
    start = time.perf_counter()
    runtime = open_runtime(artifact, job["context"], job["threads"] or physical_cores(), job["device"],
                           job["kv"])
    load = time.perf_counter() - start
    answer(load_s=load, runtime=runtime.describe(), load_average=load_average())
    ids = np.zeros(0, np.int32)
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "end":
            break
        if command["do"] == "ids":
            ids = np.array(command["ids"], np.int32)
            answer(tokens=len(ids))
        else:
            answer(**repetition(runtime, ids, command["prompts"], command["depths"], command["generate"]))
    answer(peak_rss=peak_rss(), load_average=load_average())
    runtime.close()


def read_anew(artifact: Path) -> None:
    """Drop the artifact's files from the page cache and read them again in order.

    The way they got into the cache changes the speed of a runtime that maps them. A Q8_0 file of SmolLM2-135M that was in the
    cache for a long time gave 53 tokens/s, and 72 after this."""
    if not hasattr(os, "posix_fadvise") or not artifact.exists():  # the runtime raises the error
        return
    for path in [artifact] if artifact.is_file() else sorted(p for p in artifact.iterdir() if p.is_file()):
        with path.open("rb", buffering=0) as file:
            with suppress(OSError):
                os.fsync(file.fileno())  # the cache can only drop pages that are on the disk
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while file.read(READ_BYTES):
                pass


def repetition(runtime: Runtime, ids: np.ndarray, prompts: list[int], depths: list[int], generate: int) -> dict[str, Any]:
    """Run one repetition. Keys that are lengths are text. Returns:

    first_token_s {prompt length: seconds to the first token};
    decode_s {depth: seconds to decode `generate` tokens greedily with `depth` tokens in the cache};
    joules, energy_source: of decoding at the first depth; state: of the machine at the end."""
    first, decode = {}, {}
    meters = [Meter() for _ in depths]
    cached, token = 0, 0
    for n in prompts:
        start = time.perf_counter()
        token = int(runtime.prefill(ids[:n]).argmax())
        first[str(n)] = time.perf_counter() - start
        cached = n
    for depth, meter in zip(depths, meters, strict=True):
        if depth and cached != depth:
            token = int(runtime.prefill(ids[:depth]).argmax())
        with meter:
            start = time.perf_counter()
            if depth == 0:
                token = int(runtime.prefill(ids[:1]).argmax())
            for _ in range(generate if depth else generate - 1):
                token = int(runtime.decode(token).argmax())
            decode[str(depth)] = time.perf_counter() - start
        cached = -1
    return {"first_token_s": first, "decode_s": decode, "joules": meters[0].joules, "energy_source": meters[0].source,
            "state": state()}


if __name__ == "__main__":
    main()
