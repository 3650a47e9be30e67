"""The figure of a training: the loss by step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from llmc.evals.pages import charts
from llmc.evals.pages.figure import Figure, dots

# passes that record a curve: title, caption, key of the checked value in the curve, label of its axis
TRAININGS = {"distill": ("Distillation", "Distillation loss", "loss", "loss, nats"),
             "heal": ("Healing", "KL divergence from the teacher", "kld", "KL divergence, nats")}


def figure(kind: str, trained: Sequence[tuple[int, str, dict[str, Any]]]) -> Figure:
    """The figure of the trainings of one kind. kind: a key of TRAININGS. trained: (number of the colour, name, pass)."""
    title, caption, by, label = TRAININGS[kind]
    curves = [line for colour, name, record in trained for line in _curves(colour, name, record, by)]
    return Figure(title, f"{caption} on held-out text (dots; the ring marks the saved step), and on the batch of each step "
                  "(thin line).", dots((colour, name) for colour, name, _ in trained), charts.lines(curves, "step", label))


def _curves(colour: int, name: str, record: dict[str, Any], by: str) -> Iterable[charts.Line]:
    """The loss on the batch of each step, then the value on held-out text."""
    if losses := record.get("losses"):
        yield charts.Line(f"{name}, batch", colour, list(enumerate(losses, 1)), thin=True)
    if checks := [(row["step"], row[by]) for row in record.get("curve", [])]:
        yield charts.Line(f"{name}, held-out", colour, checks, ring=record.get("best_step"))
