"""`llmc models`."""

from __future__ import annotations

import json
from pathlib import Path

import typer


def register(app: typer.Typer) -> None:
    app.command()(models)


def models(
    converter: Path | None = typer.Option(
        None, help="A llama.cpp checkout: the table says which architectures its converter knows. Its code is not executed."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object, with the figures of the proofs."),
) -> None:
    """Show what llmc can do with each model family.

    Families are model_type in config.json. Other decoder-only models of transformers can be quantized, and pruned by masks
    and by depth, too; each command says if it cannot.
    """
    from llmc.about.models import describe
    from llmc.about.models import models as table
    from llmc.sources.llama_cpp import find_converter

    found = table(converter or find_converter())
    print(json.dumps(found, indent=2) if as_json else describe(found))
