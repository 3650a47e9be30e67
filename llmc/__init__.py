"""llmc makes an LLM fit a device: quantize it, export it, and measure the file that ships.

    import llmc
    llmc.quantize("base", bits=4, out="small-4bit")
    llmc.export("small-4bit", format="gguf", out="small.gguf")
    llmc.evaluate("small.gguf", base="base", out="small.json")

Each function does what the command of that name does, with the same options (`--group-size` is `group_size`) and the same
defaults. It returns the object that the command prints with `--json`. Bad input raises llmc.errors.UserError. Importing llmc
is fast: each function imports the modules that it needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.api import (
    bench,
    compare,
    distill,
    evaluate,
    fit,
    generate,
    heal,
    imatrix,
    inspect,
    prune,
    quantize,
    ship,
    transform,
    verify,
)
from llmc.options import make
from llmc.privacy import telemetry_off

if TYPE_CHECKING:
    from llmc.export import Export
    from llmc.recipes.schema import Plan, RunReport, SweepPlan, SweepReport

    export: Export

__all__ = ["__version__", "bench", "compare", "distill", "evaluate", "export", "fit", "generate", "heal", "imatrix",
           "inspect", "prune", "quantize", "run_recipe", "ship", "sweep", "transform", "verify"]

telemetry_off()  # before any library is loaded


def run_recipe(recipe: str | Path, set: Mapping[str, Any] | Sequence[str] = (), **options: Any) -> RunReport | Plan:
    """Run a chain of commands (`llmc run`): a YAML file or a shipped recipe; options are the fields of RunConfig.

    set: {'quantize.type': 'q4_1'}, or as on the command line ['quantize.type=q4_1'].

    A missed gate raises no error: read 'passed' of the result.
    """
    from llmc.recipes.config import RunConfig
    from llmc.recipes.run import run_recipe as run

    return run(recipe, make(RunConfig, {"set": _typed(set), **options}))


def sweep(recipe: str | Path, vary: Mapping[str, Sequence[Any]] | Sequence[str] = (),
          set: Mapping[str, Any] | Sequence[str] = (), **options: Any) -> SweepReport | SweepPlan:
    """Run a recipe with every combination of option values (`llmc sweep`); options are the fields of SweepConfig.

    vary: {'quantize.type': ['q4_0', 'q4_k']}, or as on the command line ['quantize.type=q4_0,q4_k'].
    """
    from llmc.recipes.config import SweepConfig
    from llmc.recipes.sweep import sweep as run

    if isinstance(vary, Mapping):
        vary = [f"{k}={','.join(map(str, values))}" for k, values in vary.items()]
    return run(recipe, make(SweepConfig, {"vary": vary, "set": _typed(set), **options}))


def _typed(settings: Mapping[str, Any] | Sequence[str]) -> tuple[str, ...]:
    """Settings as on the command line. Values become JSON, which YAML can read."""
    import json

    if not isinstance(settings, Mapping):
        return tuple(settings)
    return tuple(f"{k}={v if isinstance(v, str) else json.dumps(v, default=str)}" for k, v in settings.items())


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("llmc-toolkit")
    if name == "export":  # the sub-package, which is callable
        from importlib import import_module

        return import_module("llmc.export")
    raise AttributeError(f"module 'llmc' has no attribute {name!r}")
