"""Groups of commands."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import typer
import typer.core

# {command: (module of llmc.cli, line in `llmc --help`)}. A module is imported only when its command is used, which keeps all
# commands fast.
TABLE: dict[str, tuple[str, str]] = {
    "prune": ("prune", "Make a float model sparser, shallower or narrower."),
    "quantize": ("quantize", "Quantize the linears of a model."),
    "transform": ("transform", "Make a float model easier to quantize."),
    "distill": ("distill", "Train a smaller model to predict what a larger one does."),
    "heal": ("heal", "Train the scales of a quantized model."),
    "imatrix": ("imatrix", "Write an importance matrix for llama-quantize."),
    "export": ("export", "Write a model as a GGUF file or an ONNX folder."),
    "eval": ("eval", "Measure the loss of quality of an artifact."),
    "bench": ("bench", "Measure the speed and memory of an artifact."),
    "compare": ("compare", "Compare reports, and check gates."),
    "fit": ("fit", "List the models that meet limits on a device."),
    "ship": ("ship", "Decide whether artifacts may ship."),
    "generate": ("generate", "Generate text from an artifact."),
    "inspect": ("inspect", "Show what is inside an artifact."),
    "verify": ("verify", "Check an artifact against its manifest."),
    "models": ("models", "Show what llmc can do with each model family."),
    "setup": ("setup", "Get llama.cpp's converter, for `llmc export`."),
    "doctor": ("doctor", "Show what is installed and what is missing."),
    "target": ("target", "Manage the devices that artifacts are measured on."),
    "run": ("run_recipe", "Run a recipe: a chain of llmc's commands."),
    "sweep": ("sweep", "Run a recipe in many variants."),
    "recipe": ("recipe", "List, copy and check recipes."),
}


class Commands(typer.core.TyperGroup):
    """A group of commands. Flags whose default is None in typer are False here. For None typer would import pydantic, which
    takes half the time of every --help."""

    def get_params(self, ctx: Any) -> Any:
        params = super().get_params(ctx)
        for param in params:
            if param.name in ("help", "install_completion", "show_completion"):
                param.default = False
        return params


class Llmc(Commands):
    """The commands of TABLE."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands = _Lazy()

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in TABLE.items()])


class _Lazy(dict[str, Any]):
    """{name: command}. A command is imported on first access."""

    def __init__(self) -> None:
        super().__init__(dict.fromkeys(TABLE))

    def __getitem__(self, name: str) -> Any:
        if (found := super().__getitem__(name)) is None:
            own = typer.Typer(cls=Commands, rich_markup_mode=None)
            import_module(f"llmc.cli.{TABLE[name][0]}").register(own)
            found = self[name] = typer.main.get_group(own).commands[name]
        return found

    def get(self, name: str, default: Any = None) -> Any:
        try:
            return self[name]
        except KeyError:
            return default

    def items(self) -> Any:
        return {name: self[name] for name in self}.items()

    def values(self) -> Any:
        return [self[name] for name in self]
