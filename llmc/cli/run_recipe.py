"""`llmc run`."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from llmc.recipes.config import RunConfig


def register(app: typer.Typer) -> None:
    app.command("run")(run_recipe)


def run_recipe(
    recipe: str = typer.Argument(..., help="A recipe: a YAML file, or a name of `llmc recipe ls`."),
    model: str | None = typer.Option(RunConfig.model, show_default=False,
                                     help="The base model, instead of the recipe's: a folder, a .gguf file or a hub id."),
    settings: list[str] = typer.Option(list(RunConfig.set), "--set", metavar="STEP.OPTION=VALUE", show_default=False,
                                       help="Another value for an option: quantize.type=q4_1. Without STEP, for every step "
                                            "that has it: calibration=my.txt."),
    out: Path | None = typer.Option(RunConfig.out, "--out", "-o", help="The run folder: everything it makes, and the page.",
                                    show_default="RECIPE"),
    dry_run: bool = typer.Option(RunConfig.dry_run, "--dry-run", help="Print the plan; do nothing."),
    as_json: bool = typer.Option(False, "--json", help="Print the report as one JSON object."),
    markdown: bool = typer.Option(False, "--markdown", help="Print the report as Markdown."),
) -> None:
    """Run a recipe: a chain of llmc's commands, each step cached, with one report for all of it.

    The whole recipe is checked before a weight is read. A step whose inputs and options have not changed is not run again;
    an interrupted run goes on. Exit code 1 where a gate of a compare step is missed.
    """
    from llmc.recipes.run import run_recipe as run

    result = run(recipe, RunConfig(model, tuple(settings), out, dry_run))
    if "plan" in result:
        from llmc.recipes.plan import lines

        print(json.dumps(result, indent=2) if as_json else lines(result["plan"]))
        return
    if as_json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        from llmc.recipes.show import summary

        page = Path(result["folder"]) / f"{result['recipe']['name']}.md"
        print(page.read_text(encoding="utf-8") if markdown else summary(result))
    from llmc.evals.compare import gates

    gates.enforce(result["gates"])
