"""The picture of how a training went."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from llmc.evals.pages import charts
from llmc.evals.pages.figure import Figure, dots

# passes that record a curve: title, caption, the figure of a check, label of its axis
TRAININGS = {"distill": ("Distillation", "The loss that was trained", "loss", "loss, nats"),
             "heal": ("Healing", "Divergence from the teacher", "kld", "KL divergence, nats")}


def figure(kind: str, trained: Sequence[tuple[int, str, dict[str, Any]]]) -> Figure:
    """kind: one of TRAININGS. trained: the number of the colour, the name and what the manifest recorded of each."""
    title, caption, by, label = TRAININGS[kind]
    curves = [line for colour, name, record in trained for line in _curves(colour, name, record, by)]
    return Figure(title, f"{caption} on held-out text (dots; a ring around the step that was kept), and on each step's batch "
                  "(thin).", dots((colour, name) for colour, name, _ in trained), charts.lines(curves, "step", label))


def _curves(colour: int, name: str, record: dict[str, Any], by: str) -> Iterable[charts.Line]:
    """The loss of each step, and over it the held-out text's."""
    if losses := record.get("losses"):
        yield charts.Line(f"{name}, batch", colour, list(enumerate(losses, 1)), thin=True)
    if checks := [(row["step"], row[by]) for row in record.get("curve", [])]:
        yield charts.Line(f"{name}, held-out", colour, checks, ring=record.get("best_step"))
