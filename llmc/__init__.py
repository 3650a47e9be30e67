"""llmc makes an LLM fit a device: quantize it, export it, and measure the file that ships.

    import llmc
    llmc.quantize("base", bits=4, out="small-4bit")
    llmc.export("small-4bit", format="gguf", out="small.gguf")
    llmc.evaluate("small.gguf", base="base", out="small.json")

Each function is the command of that name: the same options by the same names (`--group-size` is `group_size`), the same
defaults, and as its result the object that the command prints with `--json`. Bad input raises llmc.errors.UserError.
Importing llmc imports nothing heavy; each function imports what it needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from llmc.evals.compare.schema import Comparison, Shipping
    from llmc.evals.fit.schema import Fit
    from llmc.evals.report.schema import Report
    from llmc.export import Export
    from llmc.recipes.schema import Plan, RunReport, SweepPlan, SweepReport

    export: Export

__all__ = ["__version__", "bench", "compare", "distill", "evaluate", "export", "fit", "generate", "heal", "imatrix",
           "inspect", "prune", "quantize", "run_recipe", "ship", "sweep", "transform", "verify"]

Config = TypeVar("Config")


def quantize(model: str | Path, **options: Any) -> dict[str, Any]:
    """Quantize a model folder, .gguf file or hub id; options are the fields of QuantizeConfig."""
    from llmc.compress.quantize.config import QuantizeConfig
    from llmc.compress.quantize.run import quantize as run

    return run(model, _config(QuantizeConfig, options))


def prune(model: str | Path, **options: Any) -> dict[str, Any]:
    """Make a float model sparser, shallower or narrower; options are the fields of PruneConfig."""
    from llmc.compress.prune.config import PruneConfig
    from llmc.compress.prune.run import prune as run

    return run(model, _config(PruneConfig, options))


def transform(model: str | Path, **options: Any) -> dict[str, Any]:
    """Scale or rotate a float model's channels so that quantizing loses less; options are the fields of TransformConfig."""
    from llmc.compress.transform.config import TransformConfig
    from llmc.compress.transform.run import transform as run

    return run(model, _config(TransformConfig, options))


def heal(model: str | Path, teacher: str | Path, **options: Any) -> dict[str, Any]:
    """Train the scales of a quantized folder against the float model; options are the fields of HealConfig."""
    from llmc.compress.heal.config import HealConfig
    from llmc.compress.heal.run import heal as run

    return run(model, _config(HealConfig, {"teacher": str(teacher), **_texts(options)}))


def distill(student: str | Path, teacher: str | Path, **options: Any) -> dict[str, Any]:
    """Train a smaller float model to say what `teacher` says; options are the fields of DistillConfig."""
    from llmc.compress.distill.config import DistillConfig
    from llmc.compress.distill.run import distill as run

    return run(student, _config(DistillConfig, {"teacher": str(teacher), **_texts(options)}))


def imatrix(model: str | Path, **options: Any) -> dict[str, Any]:
    """Write llama.cpp's importance matrix of a model; options are the fields of ImatrixConfig."""
    from llmc.compress.imatrix.config import ImatrixConfig
    from llmc.compress.imatrix.run import imatrix as run

    return run(model, _config(ImatrixConfig, options))


def evaluate(artifact: str | Path, out: str | Path | None = None, **options: Any) -> Report:
    """Perplexity, and divergence from `base`, of a model folder or .gguf file; options are the fields of EvalConfig."""
    from llmc.evals.config import EvalConfig
    from llmc.evals.quality.run import evaluate as run

    options |= {"artifact": str(artifact), "output": out}
    return run(_config(EvalConfig, {k: str(v) if k == "base" and v is not None else v for k, v in options.items()}))


def bench(*artifacts: str | Path, out: Sequence[str | Path] = (), **options: Any) -> list[Report]:
    """Speed and memory on this machine or others, one report an artifact; options are the fields of BenchConfig."""
    from llmc.evals.bench.run import bench as run
    from llmc.evals.config import BenchConfig

    names = tuple(str(a) for a in artifacts)
    return run(BenchConfig(artifacts=names, outputs=tuple(Path(p) for p in out), **options))


def compare(*reports: str | Path, **options: Any) -> Comparison:
    """Hold report files side by side and write the page; options are the fields of CompareConfig.

    A missed gate raises nothing here: look at 'passed' and 'gates' of the result.
    """
    from llmc.evals.compare.run import compare as run
    from llmc.evals.compare.run import without_arrays
    from llmc.evals.config import CompareConfig
    from llmc.evals.pages.compare import write_page

    config = _config(CompareConfig, {"reports": tuple(Path(r) for r in reports), **options})
    result = run(config)
    write_page(result, config.page)
    return without_arrays(result)


def fit(*items: str | Path, **options: Any) -> Fit:
    """Which artifacts or reports keep limits on which devices; options are the fields of FitConfig. Look at 'fits'."""
    from llmc.evals.config import FitConfig
    from llmc.evals.fit.run import fit as run

    return run(_config(FitConfig, {"items": tuple(Path(i) for i in items), **options}))


def ship(gates: str | Path) -> Shipping:
    """Whether the artifacts of a gates file may ship; a missed gate raises nothing here: look at 'passed'."""
    from llmc.evals.compare.ship import read_gates
    from llmc.evals.compare.ship import ship as run

    return run(read_gates(Path(gates)))


def run_recipe(recipe: str | Path, set: Mapping[str, Any] | Sequence[str] = (), **options: Any) -> RunReport | Plan:
    """Run a chain of commands (`llmc run`): a YAML file or a shipped recipe; options are the fields of RunConfig.

    set: {'quantize.type': 'q4_1'}, or as typed ['quantize.type=q4_1']. A missed gate raises nothing: look at 'passed'.
    """
    from llmc.recipes.config import RunConfig
    from llmc.recipes.run import run_recipe as run

    return run(recipe, _config(RunConfig, {"set": _typed(set), **options}))


def sweep(recipe: str | Path, vary: Mapping[str, Sequence[Any]] | Sequence[str] = (),
          set: Mapping[str, Any] | Sequence[str] = (), **options: Any) -> SweepReport | SweepPlan:
    """Run a recipe in every combination of some options (`llmc sweep`); options are the fields of SweepConfig.

    vary: {'quantize.type': ['q4_0', 'q4_k']}, or as typed ['quantize.type=q4_0,q4_k'].
    """
    from llmc.recipes.config import SweepConfig
    from llmc.recipes.sweep import sweep as run

    if isinstance(vary, Mapping):
        vary = [f"{k}={','.join(map(str, values))}" for k, values in vary.items()]
    return run(recipe, _config(SweepConfig, {"vary": tuple(vary), "set": _typed(set), **options}))


def _typed(settings: Mapping[str, Any] | Sequence[str]) -> tuple[str, ...]:
    """Settings as they are typed on the command line; values as JSON, which YAML reads."""
    import json

    if not isinstance(settings, Mapping):
        return tuple(settings)
    return tuple(f"{k}={v if isinstance(v, str) else json.dumps(v, default=str)}" for k, v in settings.items())


def generate(artifact: str | Path, prompt: str, **options: Any) -> dict[str, Any]:
    """Text from an artifact in its own runtime; options are the fields of GenerateConfig."""
    from llmc.runtimes.config import GenerateConfig
    from llmc.runtimes.generation import generate as run
    from llmc.sources.resolve import locate

    return run(locate(str(artifact)), prompt, GenerateConfig(**options))


def inspect(artifact: str | Path, tensors: bool = False) -> dict[str, Any]:
    """What is inside a model folder, .gguf file or importance matrix."""
    from llmc.about.inspection import inspect as run

    return run(artifact, tensors=tensors)


def verify(artifact: str | Path) -> dict[str, Any]:
    """Check an artifact against its manifest; 'problems' is empty when all is well."""
    from llmc.about.verification import verify as run

    return run(artifact)


def _texts(options: dict[str, Any]) -> dict[str, Any]:
    """Options whose `calibration` may be one text or several, as text or as paths."""
    texts = options.get("calibration")
    if texts is None:
        return options
    return {**options, "calibration": (str(texts),) if isinstance(texts, str | Path) else tuple(str(t) for t in texts)}


def _config(cls: type[Config], options: dict[str, Any]) -> Config:
    """A config from a caller's options; paths may be given as text and texts as paths, and None stays None."""
    from dataclasses import fields

    kinds = {f.name: str(f.type) for f in fields(cls)}  # type: ignore[arg-type]

    def fitting(name: str, value: Any) -> Any:
        if isinstance(value, str) and kinds.get(name) in ("Path", "Path | None"):
            return Path(value)
        return str(value) if isinstance(value, Path) and kinds.get(name) in ("str", "str | None") else value

    return cls(**{k: fitting(k, v) for k, v in options.items()})


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("llmc-toolkit")
    if name == "export":  # the sub-package, which can be called
        from importlib import import_module

        return import_module("llmc.export")
    raise AttributeError(f"module 'llmc' has no attribute {name!r}")
