"""`llmc verify`."""

from __future__ import annotations

import json
from pathlib import Path

import typer


def register(app: typer.Typer) -> None:
    app.command()(verify)


def verify(
    artifact: Path = typer.Argument(..., metavar="ARTIFACT", help="A model or ONNX folder or a .gguf file that llmc made."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Check an artifact against its manifest.

    It compares every hash, compares every label with the values that it labels, and reads every tensor. It needs no network.

    Exit code 0 if nothing differs, else 2.
    """
    from llmc.about.verification import verify

    report = verify(artifact)
    problems = report["problems"]
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        for problem in problems:
            print(problem)
        verdict = f"problems: {len(problems)}" if problems else f"every file is unchanged ({report['files']})"
        print(f"{artifact}: {verdict}")
    if problems:
        raise typer.Exit(2)
