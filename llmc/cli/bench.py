"""`llmc bench`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import typer

from llmc.cli.options import Json, add
from llmc.evals.bench.config import BenchConfig

if TYPE_CHECKING:
    from llmc.evals.report.schema import Report


def register(app: typer.Typer) -> None:
    add(app, bench, BenchConfig)


def bench(config: BenchConfig, as_json: Json = False) -> None:
    """Measure the speed and memory of artifacts, on this machine or on another, in a fresh process.

    With --json it prints one report, or {"reports": [...]} for several artifacts.
    """
    from llmc.evals.bench.run import TargetsError, bench

    try:
        _show(bench(config), as_json)
    except TargetsError as e:
        _show(e.reports, as_json)
        raise


def _show(reports: list[Report], as_json: bool) -> None:
    from llmc.evals.report.show import speed_lines

    if as_json:
        print(json.dumps(reports[0] if len(reports) == 1 else {"reports": reports}, indent=2, ensure_ascii=False))
    else:
        print("\n\n".join(speed_lines(r) for r in reports))
