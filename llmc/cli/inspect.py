"""`llmc inspect`."""

from __future__ import annotations

import json
from pathlib import Path

import typer


def register(app: typer.Typer) -> None:
    app.command()(inspect)


def inspect(
    artifact: Path = typer.Argument(..., metavar="ARTIFACT", help="Any model or ONNX folder or .gguf file."),
    tensors: bool = typer.Option(False, "--tensors", help="List every tensor with its shape, type and bytes."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Show what is inside an artifact.

    It prints architecture, type, bits per weight, bytes by class, tokenizer, chat template, licence and provenance. For an
    importance matrix it prints texts, chunks and matrices.
    """
    from llmc.about.inspection import describe, inspect

    report = inspect(artifact, tensors=tensors)
    print(json.dumps(report, indent=2) if as_json else describe(report))
