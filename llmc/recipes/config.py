"""What can be asked of `llmc run` and `llmc sweep`. The command line takes its names and defaults from here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmc.errors import UserError

EXECUTORS = ("local", "ray")


@dataclass(frozen=True)
class RunConfig:
    """`llmc run`."""

    model: str | None = None
    """The base model, instead of the recipe's."""
    set: tuple[str, ...] = ()
    """As typed: 'quantize.type=q4_1', or 'calibration=FILE' for every step that has the option."""
    out: Path | None = None
    """The run folder. None: the recipe's name in the working folder."""
    dry_run: bool = False


@dataclass(frozen=True)
class SweepConfig:
    """`llmc sweep`."""

    vary: tuple[str, ...] = ()
    """As typed: 'quantize.type=q4_0,q4_k'. The product of all is run."""
    model: str | None = None
    set: tuple[str, ...] = ()
    out: Path | None = None
    executor: str = "local"
    """'local': one after another in this process. 'ray': on a Ray cluster whose nodes all see the run folder."""
    dry_run: bool = False

    def __post_init__(self) -> None:
        if self.executor not in EXECUTORS:
            raise UserError(f"--executor {self.executor}: must be {' or '.join(EXECUTORS)}", "see `llmc sweep --help`")
        if not self.vary:
            raise UserError("there is nothing to vary", "give --vary STEP.OPTION=VALUE,VALUE,…")
