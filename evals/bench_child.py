"""The process in which one artifact is benched: fresh, so that load time and peak memory are the artifact's own.

It reads commands from stdin, one a line, and answers with one JSON object a line: after loading, to `run` (one
repetition), and to `end` (which ends it).
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from llmc.errors import UserError
from llmc.evals.texts import PYTHON_DOCS, load_text
from llmc.onnx_folder import is_onnx_folder
from llmc.runtimes.base import Runtime, open_runtime
from llmc.runtimes.targets.this_machine import peak_rss


def main() -> None:
    """argv: one JSON object {artifact, prompt, generate, threads, device}."""
    job = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not get between the answers

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    try:
        _serve(job, answer)
    except UserError as e:
        answer(problem=e.problem, hint=e.hint)


def _serve(job: dict[str, Any], answer: Any) -> None:
    artifact = Path(job["artifact"])
    _import(artifact)
    start = time.perf_counter()
    runtime = open_runtime(artifact, job["prompt"] + job["generate"], job["threads"], job["device"])
    load = time.perf_counter() - start
    text = load_text(PYTHON_DOCS)[1]
    ids = np.resize(runtime.tokenise(text[: 8 * job["prompt"] + 64]), job["prompt"])
    answer(load_s=load, runtime=runtime.describe())
    for line in sys.stdin:
        if line.strip() == "end":
            break
        answer(**_repetition(runtime, ids, job["generate"]))
    answer(peak_rss=peak_rss())
    runtime.close()


def _import(artifact: Path) -> None:
    """Load the runtime's library now: an import is not part of an artifact's load time."""
    if artifact.suffix == ".gguf":
        from llmc.runtimes.llamacpp import use_extra_buffers

        use_extra_buffers()
        return
    onnx = ("llmc.runtimes.onnx_model", "onnx", "onnxruntime")
    torch = ("llmc.runtimes.torch_model", "transformers.models.auto.modeling_auto")
    for module in onnx if is_onnx_folder(artifact) else torch:
        importlib.import_module(module)


def _repetition(runtime: Runtime, ids: np.ndarray, generate: int) -> dict[str, float]:
    """Seconds to the first token of a prompt, and from there to the end of `generate` more, chosen greedily."""
    start = time.perf_counter()
    token = int(runtime.prefill(ids).argmax())
    first = time.perf_counter()
    for _ in range(generate):
        token = int(runtime.decode(token).argmax())
    return {"first_token_s": first - start, "decode_s": time.perf_counter() - first}


if __name__ == "__main__":
    main()
