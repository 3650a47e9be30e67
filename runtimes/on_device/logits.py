"""The device's side of a remote runtime (runtimes/remote.py): `python -m llmc.runtimes.on_device.logits JOB`.

JOB is {artifact, context, threads (null: the physical cores), device, kv (null: the runtime's own)}. The first line of output
describes the opened runtime. Then each line of stdin is {"do": NAME, ..arguments} and gets one line of JSON as the reply. If
the reply has "shape", little-endian float32 numbers of that shape follow it.
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


def _do(runtime: Runtime, request: dict[str, Any]) -> tuple[Any, ...]:
    """The reply to one request: (JSON,) or (JSON, array)."""
    match request["do"]:
        case "logits":
            return {}, runtime.logits(np.array(request["ids"], np.int32), request["start"])
        case "prefill":
            return {}, runtime.prefill(np.array(request["ids"], np.int32))
        case "decode":
            return {}, runtime.decode(request["token"])
        case "tokenize":
            return ({"ids": runtime.tokenize(request["text"], request["special"]).tolist()},)
        case "detokenize":
            return ({"text": runtime.detokenize(request["ids"])},)
        case "chat":
            return ({"text": runtime.chat(request["user"])},)
        case "end_tokens":
            return ({"ids": sorted(runtime.end_tokens)},)
    raise UserError(f"a runtime has no operation {request['do']!r}", "use the same version of llmc on both sides")


def _say(out: BinaryIO, reply: dict[str, Any], array: np.ndarray | None = None) -> None:
    say(out, reply if array is None else {**reply, "shape": array.shape})
    if array is not None:
        out.write(np.ascontiguousarray(array, "<f4").data)
        out.flush()


if __name__ == "__main__":
    main()
