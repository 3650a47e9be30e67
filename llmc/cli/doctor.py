"""`llmc doctor`."""

from __future__ import annotations

import json

import typer


def register(app: typer.Typer) -> None:
    app.command()(doctor)


def doctor(as_json: bool = typer.Option(False, "--json", help="Print one JSON object.")) -> None:
    """Show what is installed and what is missing.

    It lists runtimes, devices, packages, memory and disk, and the command that installs each missing extra.

    Exit code 0 if the core works, else 2.
    """
    from llmc.about.doctor import describe, examine

    report = examine()
    print(json.dumps(report, indent=2) if as_json else describe(report))
    if not report["ok"]:
        raise typer.Exit(2)
