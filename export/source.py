"""The source of an export: its folder, its record in the manifest, and the name of the exported file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmc.console import say
from llmc.errors import UserError
from llmc.formats.artifacts.table import artifact_at
from llmc.formats.manifest import last_artifact, read_manifest
from llmc.formats.source import COMMIT, describe_source
from llmc.sources.resolve import resolve_model


def model_folder(model: str | Path | None) -> Path:
    """The model folder of the option `model`; None: the newest model made in this working folder."""
    if model is None:
        model = last_artifact()
        if artifact_at(model).exported:
            what = "a file" if model.is_file() else "an exported folder"
            raise UserError(f"the newest artifact made here, {model}, is {what} already", "name the model folder")
        say(f"exporting {model}, the newest model made in this folder")
    return resolve_model(model)


def source_of(folder: Path) -> dict[str, Any]:
    """The source recorded in the folder's manifest; without a manifest, a description of the folder itself."""
    manifest = read_manifest(folder)
    return dict(manifest["source"]) if manifest else describe_source(folder)


def stem(folder: Path, source: dict[str, Any]) -> str:
    """The name of the exported file without its ending: the folder's name.

    A snapshot in the hub's cache has a commit as its name; then it is the model's name."""
    name = folder.resolve().name
    return str(source["name"]).rpartition("/")[2] if COMMIT.fullmatch(name) else name
