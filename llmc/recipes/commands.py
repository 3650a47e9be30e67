"""The commands that a recipe can have as steps, as data: what each takes, what it makes, where its options are declared.

Options are the fields of the commands' own configs; there is no second list of them here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

FLOAT, QUANTIZED, GGUF, ONNX, REPORT, PAGE = "float", "quantized", "gguf", "onnx", "report", "page"
MODELS = (FLOAT, QUANTIZED)
ARTIFACTS = (FLOAT, QUANTIZED, GGUF, ONNX)
CALLED = {FLOAT: "a float model", QUANTIZED: "a quantized model", GGUF: "a .gguf file", ONNX: "an ONNX folder"}

# What a recipe decides itself: inputs, outputs and how it is run. The rest of a config's fields are a step's options.
OWN = {"model", "artifact", "artifacts", "reports", "base", "teacher", "out", "output", "outputs", "page", "resume",
       "dry_run"}
PLACEHOLDERS: dict[str, Any] = {"artifact": "-", "artifacts": ("-",), "reports": (), "teacher": "-"}


@dataclass(frozen=True)
class Command:
    """name: as on the command line  function: of the package llmc  takes: kinds of its input  gives: kind of its output
    configs: module and class by format ('' where there is one)  short: the option that `- command: value` sets
    code: packages whose source decides the result  resumes: an interrupted run goes on
    needs: packages to import by format, with the extra that installs them
    """

    name: str
    function: str
    takes: tuple[str, ...]
    gives: str
    configs: dict[str, str]
    code: tuple[str, ...]
    short: str | None = None
    resumes: bool = False
    needs: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def config(self, format: str = "") -> type:
        """The dataclass of its options. Importing it imports nothing heavy."""
        module, _, name = self.configs[format].partition(":")
        found: type = getattr(import_module(module), name)
        return found

    @property
    def makes_model(self) -> bool:
        return self.gives in ARTIFACTS


_COMPRESS = ("llmc.compress", "llmc.formats", "llmc.formats.types", "llmc.formats.types", "llmc.export.blocks", "llmc.export.gptq",
             "llmc.formats.packing")
_MEASURE = ("llmc.evals", "llmc.runtimes")


def _compress(name: str, takes: tuple[str, ...], gives: str, config: str, short: str | None = None) -> Command:
    return Command(name, name, takes, gives, {"": f"llmc.compress.{name}.config:{config}"}, _COMPRESS, short, resumes=True)


def _measure(name: str, function: str, gives: str, config: str) -> Command:
    return Command(name, function, ARTIFACTS, gives, {"": f"llmc.evals.config:{config}"}, _MEASURE)


COMMANDS: dict[str, Command] = {c.name: c for c in (
    _compress("prune", (FLOAT,), FLOAT, "PruneConfig", "method"),
    _compress("distill", (FLOAT,), FLOAT, "DistillConfig", "steps"),
    _compress("transform", (FLOAT,), FLOAT, "TransformConfig"),
    _compress("quantize", (FLOAT,), QUANTIZED, "QuantizeConfig", "type"),
    _compress("heal", (QUANTIZED,), QUANTIZED, "HealConfig", "steps"),
    Command("export", "export", MODELS, GGUF,
            {"gguf": "llmc.export.gguf.config:GgufExportConfig", "onnx": "llmc.export.onnx.config:OnnxExportConfig"},
            ("llmc.export", "llmc.formats.types", "llmc.formats.types"), "format",
            needs={"gguf": ("gguf", "llama_cpp"), "onnx": ("onnx", "onnxruntime", "onnxruntime_genai")}),
    _measure("eval", "evaluate", REPORT, "EvalConfig"),
    _measure("bench", "bench", REPORT, "BenchConfig"),
    _measure("compare", "compare", PAGE, "CompareConfig"),
)}

# What ONNX Runtime has a weight type for (export/onnx/layout.py); budgets and presets mix in others.
ONNX_TYPES = ("q4_0", "q4_1", "q8_0")


@cache
def options(command: str, format: str = "") -> dict[str, dataclasses.Field[Any]]:
    """A command's options by name, those that a recipe decides itself left out."""
    config = COMMANDS[command].config(format)
    return {f.name: f for f in dataclasses.fields(config) if f.name not in OWN}  # type: ignore[arg-type]


def every_option() -> set[str]:
    """The options of all commands together."""
    return {name for c in COMMANDS.values() for format in c.configs for name in options(c.name, format)}
