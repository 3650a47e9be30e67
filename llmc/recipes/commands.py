"""The commands that a recipe can have as steps, as data: the input, the result and the config of each.

Options are the fields of the commands' own configs. They are not listed again here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache
from typing import Any

from llmc.compress.distill.config import DistillConfig
from llmc.compress.heal.config import HealConfig
from llmc.compress.prune.config import PruneConfig
from llmc.compress.quantize.config import QuantizeConfig
from llmc.compress.transform.config import TransformConfig
from llmc.evals.bench.config import BenchConfig
from llmc.evals.compare.config import CompareConfig
from llmc.evals.quality.config import EvalConfig
from llmc.export.formats import FORMATS

FLOAT, QUANTIZED, REPORT, PAGE = "float", "quantized", "report", "page"
EXPORTED = tuple(FORMATS)  # what `llmc export` makes, by format
MODELS = (FLOAT, QUANTIZED)
ARTIFACTS = (*MODELS, *EXPORTED)
CALLED = {FLOAT: "a float model", QUANTIZED: "a quantized model", **{name: row.called for name, row in FORMATS.items()}}

# Fields of configs that the recipe sets: inputs, outputs and how it runs. All other fields are options of a step.
OWN = {"model", "artifact", "artifacts", "reports", "base", "teacher", "out", "output", "outputs", "page", "resume",
       "dry_run"}
PLACEHOLDERS: dict[str, Any] = {"artifact": "-", "artifacts": ("-",), "reports": (), "teacher": "-"}


@dataclass(frozen=True)
class Command:
    """name: as on the command line  function: of the package llmc  takes: kinds of its input
    gives: kind of its result ('': its format)  configs: {format: config} ('' if it has no formats)
    short: the option that `- command: value` sets  resumes: whether an interrupted run can continue
    code: modules whose source, with all their imports, affects the result
    needs: {format: modules that it imports}; the extra of that name installs them
    """

    name: str
    function: str
    takes: tuple[str, ...]
    gives: str
    configs: dict[str, type]
    code: tuple[str, ...]
    short: str | None = None
    resumes: bool = False
    needs: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    @property
    def makes_model(self) -> bool:
        return not self.gives or self.gives in ARTIFACTS


def _compress(name: str, config: type, takes: str, gives: str, short: str | None = None) -> Command:
    return Command(name, name, (takes,), gives, {"": config}, (f"llmc.compress.{name}.run",), short, resumes=True)


def _measure(name: str, function: str, config: type, gives: str, code: str) -> Command:
    return Command(name, function, ARTIFACTS, gives, {"": config}, (code,))


COMMANDS: dict[str, Command] = {c.name: c for c in (
    _compress("prune", PruneConfig, FLOAT, FLOAT, "method"),
    _compress("distill", DistillConfig, FLOAT, FLOAT, "steps"),
    _compress("transform", TransformConfig, FLOAT, FLOAT),
    _compress("quantize", QuantizeConfig, FLOAT, QUANTIZED, "type"),
    _compress("heal", HealConfig, QUANTIZED, QUANTIZED, "steps"),
    Command("export", "export", MODELS, "", {name: row.config for name, row in FORMATS.items()},
            tuple(row.code for row in FORMATS.values()), "format", needs={name: row.needs for name, row in FORMATS.items()}),
    _measure("eval", "evaluate", EvalConfig, REPORT, "llmc.evals.quality.run"),
    _measure("bench", "bench", BenchConfig, REPORT, "llmc.evals.bench.run"),
    _measure("compare", "compare", CompareConfig, PAGE, "llmc.evals.pages.compare"),
)}

# The types that ONNX Runtime can hold (export/onnx/layout.py). Budgets and presets also use others.
ONNX_TYPES = ("q4_0", "q4_1", "q8_0")


@cache
def options(command: str, format: str = "") -> dict[str, dataclasses.Field[Any]]:
    """{option: field} of a command, without the fields that the recipe sets."""
    config = COMMANDS[command].configs[format]
    return {f.name: f for f in dataclasses.fields(config) if f.name not in OWN}  # type: ignore[arg-type]


def every_option() -> set[str]:
    """The options of all commands together."""
    return {name for c in COMMANDS.values() for format in c.configs for name in options(c.name, format)}
