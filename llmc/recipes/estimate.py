"""How long and how large a step will be: from what such steps took in this folder before, and from the commands' own plans.

Nothing is guessed: without an earlier step of the kind there is no time.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from llmc import api
from llmc.errors import UserError
from llmc.files import read_note, write_note
from llmc.formats.manifest import NOTES
from llmc.recipes.jobs import Job

KEPT = 8  # earlier steps of a kind that are remembered


def kind(job: Job) -> str:
    """Steps whose times can be held against each other, scaled by `work`."""
    config = job.step.typed.config
    how = [str(getattr(config, name)) for name in ("method", "scope", "scaling", "exporter", "device") if hasattr(config, name)]
    return " ".join([job.step.command, job.step.typed.format, *how, str(getattr(config, "heal", 0) > 0)])


def work(job: Job, base_bytes: int) -> float:
    """What the time of a step goes with: the base's bytes times the tokens (or repetitions) that are run through it."""
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
        tokens = c.samples * c.seq_len if getattr(c, "calibrated", hasattr(c, "samples")) else 1
    return float(base_bytes) * tokens


class Times:
    """Seconds and bytes of earlier steps, in `.llmc/` of the working folder."""

    def __init__(self) -> None:
        self.path = Path(NOTES) / "step-times.json"
        self.known: dict[str, list[list[float]]] = read_note(self.path)

    def seconds(self, job: Job, base_bytes: int) -> float | None:
        """The median of earlier steps of the kind, scaled."""
        rates = [s / w for w, s, _, _ in self.known.get(kind(job), [])]
        return median(rates) * work(job, base_bytes) if rates else None

    def disk(self, job: Job, base_bytes: int) -> float | None:
        """Bytes that it will leave, by what such steps left of a base's."""
        shares = [left / base for _, _, base, left in self.known.get(kind(job), [])]
        return median(shares) * base_bytes if shares else None

    def note(self, job: Job, base_bytes: int, seconds: float, left: int) -> None:
        """Remember a step that was run from start to end."""
        self.known[kind(job)] = [*self.known.get(kind(job), []), [work(job, base_bytes), seconds, base_bytes, left]][-KEPT:]
        write_note(self.path, self.known)


def own_plan(job: Job, model: Path | str, base: str, there: bool) -> dict[str, Any]:
    """What the command's own --dry-run says of memory and disk, in bytes; {} where it has none.

    model: what it will work on, or the base where that is not made yet (there False): its problems are then not the step's.
    """
    options = job.step.typed.options()
    try:
        # the plan of a budget measures first, for minutes
        if job.step.command in ("prune", "distill", "quantize") and not getattr(job.step.typed.config, "target", None):
            teacher = {"teacher": base} if job.teacher else {}
            plan: dict[str, Any] = getattr(api, job.step.command)(model, dry_run=True, **teacher, **options)
            return {k: plan[k] for k in ("memory_bytes", "disk_bytes") if k in plan}
        if job.step.command == "transform":
            from llmc.compress.transform.run import check, disk_bytes
            from llmc.sources.resolve import resolve_model

            config = job.step.typed.config
            return {"disk_bytes": disk_bytes(check(resolve_model(model), config), config)}
    except UserError:
        if there:
            raise
    return {}
