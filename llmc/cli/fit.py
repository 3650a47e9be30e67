"""`llmc fit`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from llmc.cli.options import Json, add
from llmc.evals.fit.config import FitConfig
from llmc.options import ADVANCED, make


def register(app: typer.Typer) -> None:
    add(app, fit, FitConfig)


def fit(
    options: dict[str, Any],
    validate: Annotated[bool, typer.Option("--validate", rich_help_panel=ADVANCED, help=(
        "Compare estimates with measurements, and print the errors."))] = False,
    profiles: Annotated[bool, typer.Option("--profiles", rich_help_panel=ADVANCED, help=(
        "List the device profiles, with the source of every figure."))] = False,
    as_json: Json = False,
) -> None:
    """List the models that meet latency and memory limits on a device. If none does, suggest one to make.

    Figures are measured or estimated. An estimate is shown with its interval, and the answer is `maybe` if the interval
    contains the limit. Exit code 0 if every target has a model that certainly fits, else 1.
    """
    from llmc.evals.report.show import table

    if profiles:
        from llmc.evals.fit.profiles import profile_lines, profiles_json

        print(json.dumps(profiles_json(), indent=2, ensure_ascii=False) if as_json else profile_lines())
        return
    if validate:
        from llmc.evals.fit.validate import rows
        from llmc.evals.fit.validate import validate as run

        points = run(tuple(options["items"] or ()), options["targets"])
        print(json.dumps({"points": points}, indent=2, ensure_ascii=False) if as_json else table(rows(points)))
        return
    from llmc.evals.fit.run import fit
    from llmc.evals.fit.show import fit_lines

    result = fit(make(FitConfig, options))
    print(json.dumps(result, indent=2, ensure_ascii=False) if as_json else fit_lines(result))
    raise typer.Exit(0 if result["fits"] else 1)
