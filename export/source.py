"""Where an export comes from: the folder that is exported, what a manifest says of it, and the name it gives a file."""

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
    """The folder that the user means; None: the newest made in this working folder."""
    if model is None:
        model = last_artifact()
        if artifact_at(model).exported:
            what = "a file" if model.is_file() else "an exported folder"
            raise UserError(f"the newest artifact made here, {model}, is {what} already", "name the model folder")
        say(f"exporting {model}, the newest model made in this folder")
    return resolve_model(model)


def source_of(folder: Path) -> dict[str, Any]:
    """What the manifest of an artifact of llmc says of the model it was made from, else the folder itself."""
    manifest = read_manifest(folder)
    return dict(manifest["source"]) if manifest else describe_source(folder)


def stem(folder: Path, source: dict[str, Any]) -> str:
    """The folder's name; a snapshot in the hub's cache is called by a commit and takes the model's name."""
    name = folder.resolve().name
    return str(source["name"]).rpartition("/")[2] if COMMIT.fullmatch(name) else name
