"""`llmc sweep`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from llmc.cli.options import Json, Markdown, add
from llmc.options import make
from llmc.recipes.config import SweepConfig


def register(app: typer.Typer) -> None:
    add(app, sweep, SweepConfig)


def sweep(
    recipe: Annotated[str, typer.Argument(help="A recipe: a YAML file, or a name of `llmc recipe ls`.")],
    options: dict[str, Any],
    more: Annotated[list[str] | None, typer.Argument(metavar="STEP.OPTION=VALUE,VALUE", show_default=False, help=(
        "More values to try, as after --vary."))] = None,
    as_json: Json = False, markdown: Markdown = False,
) -> None:
    """Run a recipe in many variants, share the steps that are the same, and show the Pareto front.

    The page shows the size, KL divergence and speed of every exported file. Exit code 1 if a gate is missed, 2 if a variant
    failed.
    """
    from llmc.errors import UserError
    from llmc.recipes.sweep import sweep as run

    config = make(SweepConfig, {**options, "vary": (*options["vary"], *(more or ()))})
    result = run(recipe, config)
    if "plan" in result:
        from llmc.recipes.plan import lines

        heading = f"{len(result['variants'])} variants\n"
        print(json.dumps(result, indent=2) if as_json else heading + lines(result["plan"]))
        return
    if as_json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        from llmc.recipes.show import sweep_summary
        from llmc.recipes.sweep_page import markdown as to_markdown

        print(to_markdown(result) if markdown else sweep_summary(result))
    if failed := [v["variant"] for v in result["variants"] if v["failed"]]:
        raise UserError(f"{len(failed)} of {len(result['variants'])} variants failed: {'; '.join(failed)}",
                        "the table gives the reasons: fix them and run the sweep again")
    from llmc.evals.compare import gates

    gates.enforce([g for v in result["variants"] for g in v.get("gates", [])])
