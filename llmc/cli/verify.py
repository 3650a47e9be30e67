"""`llmc verify`."""

from __future__ import annotations

import json
from pathlib import Path

import typer


def register(app: typer.Typer) -> None:
    app.command()(verify)


def verify(
    artifact: Path = typer.Argument(..., metavar="ARTIFACT", help="A model or ONNX folder or .gguf file that llmc made."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Check an artifact against its manifest.

    Compares every hash, every label with the values it labels, and reads every tensor. Works offline.

    Exit code 0 when all is well, 2 when anything differs.
    """
    from llmc.about.verification import verify

    report = verify(artifact)
    problems = report["problems"]
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        for problem in problems:
            print(problem)
        verdict = f"problems: {len(problems)}" if problems else f"every file is as made ({report['files']})"
        print(f"{artifact}: {verdict}")
    if problems:
        raise typer.Exit(2)
