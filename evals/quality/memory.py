"""The memory of `llmc eval`: both models stay loaded, and the logits of one chunk are there at a time."""

from __future__ import annotations

from pathlib import Path

from llmc.evals.quality import tasks
from llmc.evals.quality.config import EvalConfig
from llmc.evals.quality.metrics import ROWS
from llmc.formats.artifacts.table import artifact_at
from llmc.memory import PROCESS, TORCH, WITHOUT_TORCH, Memory, Step
from llmc.runtimes.amx import use_extra_buffers
from llmc.runtimes.memory import Held, held

FLOAT = 4


def memory_of(artifact: Path, base: Path | None, c: EvalConfig) -> Memory:
    """The steps of an evaluation on this machine. artifact: left out if a target runs it.  base: None if there is none, or
    if it is the artifact itself."""
    paths = [p for p in (None if c.target else artifact, base) if p is not None]
    context = max(c.context, tasks.WINDOW) if c.tasks else c.context
    scored = context - context // 2
    repacks = any(artifact_at(p).format == "gguf" for p in paths) and use_extra_buffers()
    models = [(p, held(p, context, scored, c.kv if p == artifact else None, repacks)) for p in paths]
    vocabulary = max((artifact_at(p).shape()["vocabulary"] for p in paths), default=0)
    terms = {PROCESS: TORCH if any(artifact_at(p).format == "hf" for p in paths) else WITHOUT_TORCH}
    before: dict[str, int] = {}
    steps = []
    for path, model in models:  # the second is loaded beside the first
        steps.append(Step(f"loading {path.name}", {**terms, **before, **_named(path, model)}, model.once))
        before |= _named(path, model)
    # `_logits` looks for NaN, a byte each; `divergence`: two log-softmaxes of some rows, their exponentials and sums
    measuring = {"search for NaN": scored * vocabulary, "metrics": ROWS * vocabulary * (6 * FLOAT + 8)}
    return Memory([*steps, Step("comparing logits", {**terms, **before, **measuring})])


def _named(path: Path, model: Held) -> dict[str, int]:
    return {f"{name} of {path.name}": n for name, n in model.terms.items()}
