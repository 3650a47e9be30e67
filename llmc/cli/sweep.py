"""`llmc sweep`."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from llmc.recipes.config import SweepConfig


def register(app: typer.Typer) -> None:
    app.command()(sweep)


def sweep(
    recipe: str = typer.Argument(..., help="A recipe: a YAML file, or a name of `llmc recipe ls`."),
    more: list[str] = typer.Argument(None, metavar="[STEP.OPTION=VALUE,…]…", show_default=False,
                                     help="More to vary, as after --vary."),
    vary: list[str] = typer.Option(list(SweepConfig.vary), "--vary", metavar="STEP.OPTION=VALUE,VALUE,…", show_default=False,
                                   help="The values to try: quantize.type=q4_0,q4_k prune.drop=0,2,4. All combinations are "
                                        "run."),
    model: str | None = typer.Option(SweepConfig.model, show_default=False, help="The base model, instead of the recipe's."),
    settings: list[str] = typer.Option(list(SweepConfig.set), "--set", metavar="STEP.OPTION=VALUE", show_default=False,
                                       help="Another value for an option, in every variant."),
    out: Path | None = typer.Option(SweepConfig.out, "--out", "-o", show_default="RECIPE",
                                    help="The run folder; that of `llmc run` may be given, and its steps are used again."),
    executor: str = typer.Option(SweepConfig.executor, help="local, or ray: on the cluster of RAY_ADDRESS (or a new one on "
                                                            "this machine), whose nodes must all see the run folder."),
    dry_run: bool = typer.Option(SweepConfig.dry_run, "--dry-run", help="Print the plan; do nothing."),
    as_json: bool = typer.Option(False, "--json", help="Print the report as one JSON object."),
    markdown: bool = typer.Option(False, "--markdown", help="Print the report as Markdown."),
) -> None:
    """Run a recipe in many variants, which share the steps that are the same, and show the Pareto front.

    The page has every exported file by size, KL divergence and speed. Exit code 1 where a gate was missed, 2 where a variant
    failed.
    """
    from llmc.errors import UserError
    from llmc.recipes.sweep import sweep as run

    config = SweepConfig((*vary, *(more or ())), model, tuple(settings), out, executor, dry_run)
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
                        "the table says why; run the sweep again when that is mended")
    from llmc.evals.compare import gates

    gates.enforce([g for v in result["variants"] for g in v.get("gates", [])])
