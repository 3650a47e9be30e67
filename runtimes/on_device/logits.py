"""A runtime for another machine (runtimes/remote.py): `python -m llmc.runtimes.on_device.logits JOB`.

JOB is {artifact, context, threads (null: the physical cores), device, kv (null: the runtime's own)}. First it tells what it
opened. Then each line of stdin is {"do": NAME, …} and is answered by one line of JSON; where that has "shape", float32
numbers of that shape follow it, little-endian.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llmc.errors import UserError
from llmc.machine import describe, physical_cores
from llmc.runtimes.base import Runtime
from llmc.runtimes.on_device.answers import answers, say
from llmc.runtimes.open import open_runtime


def main() -> None:
    job = json.loads(sys.argv[1])
    with answers() as out:
        try:
            runtime = open_runtime(Path(job["artifact"]), job["context"], job["threads"] or physical_cores(), job["device"],
                                   job["kv"])
            _say(out, {"vocab_size": runtime.vocab_size, "context": runtime.context, "name": runtime.name,
                           "kv_type": runtime.kv_type,
                           "runtime": runtime.describe(), "machine": describe()})
            for line in sys.stdin.buffer:
                _say(out, *_do(runtime, json.loads(line)))
            runtime.close()
        except UserError as e:
            _say(out, {"problem": e.problem, "hint": e.hint})


def _do(runtime: Runtime, asked: dict[str, Any]) -> tuple[Any, ...]:
    """The answer to one line: JSON, and perhaps an array."""
    match asked["do"]:
        case "logits":
            return {}, runtime.logits(np.array(asked["ids"], np.int32), asked["start"])
        case "prefill":
            return {}, runtime.prefill(np.array(asked["ids"], np.int32))
        case "decode":
            return {}, runtime.decode(asked["token"])
        case "tokenize":
            return ({"ids": runtime.tokenize(asked["text"], asked["special"]).tolist()},)
        case "detokenize":
            return ({"text": runtime.detokenize(asked["ids"])},)
        case "chat":
            return ({"text": runtime.chat(asked["user"])},)
        case "end_tokens":
            return ({"ids": sorted(runtime.end_tokens)},)
    raise UserError(f"{asked['do']!r} is nothing that a runtime does", "both sides must be of the same llmc")


def _say(out: BinaryIO, told: dict[str, Any], array: np.ndarray | None = None) -> None:
    say(out, told if array is None else {**told, "shape": array.shape})
    if array is not None:
        out.write(np.ascontiguousarray(array, "<f4").data)
        out.flush()


if __name__ == "__main__":
    main()
