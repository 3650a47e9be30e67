"""Estimates of a step's time and size, from earlier steps in this working folder and from the commands' own plans.

Without an earlier step of the same kind there is no estimate of the time.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from llmc import api
from llmc.compress.shared_options import SAMPLES
from llmc.errors import UserError
from llmc.files import read_note, write_note
from llmc.formats.manifest import NOTES
from llmc.recipes.jobs import Job

KEPT = 8  # earlier steps to keep of each kind


def kind(job: Job) -> str:
    """The kind of a step. Times of steps of one kind are comparable if they are scaled by `work`."""
    config = job.step.typed.config
    names = ("method", "scope", "scaling", "exporter", "device")
    how = [str(getattr(config, name)) for name in names if hasattr(config, name)]
    return " ".join([job.step.command, job.step.typed.format, *how, str(getattr(config, "heal", 0) > 0)])


def work(job: Job, base_bytes: int) -> float:
    """The amount of work, proportional to a step's time: bytes of the base times tokens processed."""
    c = job.step.typed.config
    if hasattr(c, "steps"):
        tokens = c.steps * c.batch * getattr(c, "accumulate", 1) * c.seq_len
    elif hasattr(c, "chunks"):
        tokens = (c.chunks or 1000) * c.context * (1 + (c.second_text is not None)) * (not c.no_text) + 100 * len(
            c.tasks) * c.task_items
    elif hasattr(c, "repetitions"):
        one = sum(c.prompt) + sum(c.depth) + len(c.depth) * c.generate
        tokens = (c.repetitions + c.warmup) * one * len(job.inputs)
    else:
        tokens = (c.samples or SAMPLES) * c.seq_len if getattr(c, "calibrated", hasattr(c, "samples")) else 1
    return float(base_bytes) * tokens


class Times:
    """Seconds and bytes of earlier steps, in `.llmc/` of the working folder."""

    def __init__(self) -> None:
        self.path = Path(NOTES) / "step-times.json"
        self.known: dict[str, list[list[float]]] = read_note(self.path)

    def seconds(self, job: Job, base_bytes: int) -> float | None:
        """The expected time: the median of earlier steps of the kind, scaled by `work`. None if there are none."""
        rates = [s / w for w, s, _, _ in self.known.get(kind(job), [])]
        return median(rates) * work(job, base_bytes) if rates else None

    def disk(self, job: Job, base_bytes: int) -> float | None:
        """The expected bytes of the result: the median of earlier steps, scaled by the base. None if there are none."""
        shares = [left / base for _, _, base, left in self.known.get(kind(job), [])]
        return median(shares) * base_bytes if shares else None

    def note(self, job: Job, base_bytes: int, seconds: float, left: int) -> None:
        """Record a step that ran from start to end. left: bytes of its result."""
        self.known[kind(job)] = [*self.known.get(kind(job), []), [work(job, base_bytes), seconds, base_bytes, left]][-KEPT:]
        write_note(self.path, self.known)


def own_plan(job: Job, model: Path | str, base: str, exists: bool) -> dict[str, Any]:
    """{'memory_bytes', 'disk_bytes'} from the command's own --dry-run; {} if it has none.

    model: the input of the step, or the base if that input does not exist yet.  exists: whether the input exists. If not,
    errors are ignored, because they may hold for the base only.
    """
    options = job.step.typed.options()
    try:
        # the plan of a budget takes minutes: it measures first; that of healing reads the step's own input
        planned = ("prune", "distill", "quantize", "imatrix", "transform", *(("heal",) if exists else ()))
        if job.step.command in planned and not getattr(job.step.typed.config, "target", None):
            teacher = {"teacher": base} if job.teacher else {}
            plan: dict[str, Any] = getattr(api, job.step.command)(model, dry_run=True, **teacher, **options)
            return {k: plan[k] for k in ("memory_bytes", "disk_bytes") if k in plan}
    except UserError:
        if exists:
            raise
    return {}
