"""`llmc run`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from llmc.cli.options import Json, Markdown, add
from llmc.recipes.config import RunConfig


def register(app: typer.Typer) -> None:
    add(app, run_recipe, RunConfig, name="run")


def run_recipe(
    recipe: Annotated[str, typer.Argument(help="A recipe: a YAML file, or a name of `llmc recipe ls`.")],
    config: RunConfig, as_json: Json = False, markdown: Markdown = False,
) -> None:
    """Run a recipe: a chain of llmc's commands. Each step is cached, and one report covers all of them.

    The whole recipe is checked before a weight is read. A step is run again only if its inputs or options have changed. An
    interrupted run continues. Exit code 1 if a gate of a compare step is missed.
    """
    from llmc.recipes.run import run_recipe as run

    result = run(recipe, config)
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
