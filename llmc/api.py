"""One function per command that works on a model or on reports. The package `llmc` exports them, and recipes call them.

Options are passed by name and become the command's config. Each function imports the modules that it needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.options import make

if TYPE_CHECKING:
    from llmc.evals.compare.schema import Comparison, Shipping
    from llmc.evals.fit.schema import Fit
    from llmc.evals.report.schema import Report


def quantize(model: str | Path, **options: Any) -> dict[str, Any]:
    """Quantize a model folder, .gguf file or hub id; options are the fields of QuantizeConfig."""
    from llmc.compress.quantize.config import QuantizeConfig
    from llmc.compress.quantize.run import quantize as run

    return run(model, make(QuantizeConfig, options))


def prune(model: str | Path, **options: Any) -> dict[str, Any]:
    """Make a float model sparser, shallower or narrower; options are the fields of PruneConfig."""
    from llmc.compress.prune.config import PruneConfig
    from llmc.compress.prune.run import prune as run

    return run(model, make(PruneConfig, options))


def transform(model: str | Path, **options: Any) -> dict[str, Any]:
    """Scale or rotate a float model's channels so that quantization loses less; options are the fields of TransformConfig."""
    from llmc.compress.transform.config import TransformConfig
    from llmc.compress.transform.run import transform as run

    return run(model, make(TransformConfig, options))


def heal(model: str | Path, teacher: str | Path, **options: Any) -> dict[str, Any]:
    """Train the scales of a quantized folder against the float model; options are the fields of HealConfig."""
    from llmc.compress.heal.config import HealConfig
    from llmc.compress.heal.run import heal as run

    return run(model, make(HealConfig, {"teacher": teacher, **options}))


def distill(student: str | Path, teacher: str | Path, **options: Any) -> dict[str, Any]:
    """Train a smaller float model to predict what `teacher` predicts; options are the fields of DistillConfig."""
    from llmc.compress.distill.config import DistillConfig
    from llmc.compress.distill.run import distill as run

    return run(student, make(DistillConfig, {"teacher": teacher, **options}))


def imatrix(model: str | Path, **options: Any) -> dict[str, Any]:
    """Write llama.cpp's importance matrix of a model; options are the fields of ImatrixConfig."""
    from llmc.compress.imatrix.config import ImatrixConfig
    from llmc.compress.imatrix.run import imatrix as run

    return run(model, make(ImatrixConfig, options))


def export(model: str | Path | None = None, format: str = "gguf", **options: Any) -> dict[str, Any]:
    """Export a model for a runtime; options are the fields of the format's config.

    model: None is the newest artifact made in this working folder.
    """
    from llmc import export as package

    return package(model, format=format, **options)


def evaluate(artifact: str | Path, out: str | Path | None = None, **options: Any) -> Report:
    """Measure perplexity, and KL divergence from `base`, of an artifact; options are the fields of EvalConfig."""
    from llmc.evals.quality.config import EvalConfig
    from llmc.evals.quality.run import evaluate as run

    return run(make(EvalConfig, {"artifact": artifact, "output": out, **options}))


def bench(*artifacts: str | Path, out: Sequence[str | Path] = (), **options: Any) -> list[Report]:
    """Measure speed and memory on this machine or others, one report per artifact; options are the fields of BenchConfig."""
    from llmc.evals.bench.config import BenchConfig
    from llmc.evals.bench.run import bench as run

    return run(make(BenchConfig, {"artifacts": artifacts, "outputs": out, **options}))


def compare(*reports: str | Path, **options: Any) -> Comparison:
    """Compare report files and write the page; options are the fields of CompareConfig.

    A missed gate raises no error: read 'passed' and 'gates' of the result.
    """
    from llmc.evals.compare.config import CompareConfig
    from llmc.evals.compare.run import compare as run
    from llmc.evals.compare.run import without_arrays
    from llmc.evals.pages.compare import write_page

    config = make(CompareConfig, {"reports": reports, **options})
    result = run(config)
    write_page(result, config.page)
    return without_arrays(result)


def fit(*items: str | Path, **options: Any) -> Fit:
    """List the artifacts or reports that meet limits on devices; options are the fields of FitConfig.

    'fits' of the result: whether every device has an artifact that certainly fits.
    """
    from llmc.evals.fit.config import FitConfig
    from llmc.evals.fit.run import fit as run

    return run(make(FitConfig, {"items": items, **options}))


def ship(gates: str | Path) -> Shipping:
    """Decide whether the artifacts of a gates file may ship. A missed gate raises no error: read 'passed' of the result."""
    from llmc.evals.compare.ship import read_gates
    from llmc.evals.compare.ship import ship as run

    return run(read_gates(Path(gates)))


def generate(artifact: str | Path, prompt: str, **options: Any) -> dict[str, Any]:
    """Generate text from an artifact in its own runtime; options are the fields of GenerateConfig."""
    from llmc.runtimes.config import GenerateConfig
    from llmc.runtimes.generation import generate as run
    from llmc.sources.resolve import locate

    return run(locate(str(artifact)), prompt, make(GenerateConfig, options))


def inspect(artifact: str | Path, tensors: bool = False) -> dict[str, Any]:
    """The contents of a model folder, .gguf file or importance matrix."""
    from llmc.about.inspection import inspect as run

    return run(artifact, tensors=tensors)


def verify(artifact: str | Path) -> dict[str, Any]:
    """Check an artifact against its manifest; 'problems' of the result lists the differences."""
    from llmc.about.verification import verify as run

    return run(artifact)
