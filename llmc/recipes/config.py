"""The options of `llmc run` and `llmc sweep`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmc import options
from llmc.errors import UserError
from llmc.options import RUN, check, like, option

EXECUTORS = ("local", "ray")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The options of `llmc run`."""

    model: str | None = option(
        None, help="Base model, instead of the recipe's: a folder, a .gguf file or a hub id.", metavar="MODEL")
    set: tuple[str, ...] = option(
        (), help="Another value of an option: quantize.type=q4_1. Without STEP it is set in every step that has the option: "
                 "calibration=my.txt. The option may be repeated.", metavar="STEP.OPTION=VALUE")
    out: Path | None = options.out("Folder of the run. It holds everything that the run makes, and the page.", "RECIPE")
    dry_run: bool = options.dry_run()


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """The options of `llmc sweep`."""

    vary: tuple[str, ...] = option(
        (), help="Values to try: quantize.type=q4_0,q4_k prune.drop=0,2,4. All combinations are run.",
        metavar="STEP.OPTION=VALUE,VALUE,...")
    model: str | None = like(RunConfig, "model")
    set: tuple[str, ...] = like(RunConfig, "set", help="Another value of an option, in every variant.")
    out: Path | None = like(
        RunConfig, "out", help="Folder of the run. It may be the folder of `llmc run`, whose steps are then used again.")
    executor: str = option(
        "local", help="Where steps run. local runs them one after another on this machine. ray runs them on the cluster of "
                      "RAY_ADDRESS, or on a new one on this machine. All nodes must see the run folder.", choices=EXECUTORS,
        group=RUN)
    dry_run: bool = options.dry_run()

    def __post_init__(self) -> None:
        check(self, "sweep")
        if not self.vary:
            raise UserError("there is nothing to vary", "give --vary STEP.OPTION=VALUE,VALUE,…")
