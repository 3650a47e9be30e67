"""The table of formats, and which of them a path is of."""

from __future__ import annotations

from pathlib import Path

from llmc.errors import UserError
from llmc.formats.artifact import Artifact
from llmc.formats.artifacts.folder import FolderArtifact
from llmc.formats.artifacts.gguf import GgufArtifact
from llmc.formats.artifacts.onnx import OnnxArtifact
from llmc.temporary import restore

# The first that recognises a path is its format. FolderArtifact takes every folder that no other wants: it is the last.
FORMATS: tuple[type[Artifact], ...] = (GgufArtifact, OnnxArtifact, FolderArtifact)


def format_of(path: Path) -> type[Artifact] | None:
    """The format of a path, which need not exist. None: it is of no format."""
    return next((kind for kind in FORMATS if kind.recognises(path)), None)


def artifact_at(path: Path) -> Artifact:
    """The artifact at a path. Raises UserError where there is none."""
    restore(path)
    kind = format_of(path)
    if kind is None or not path.exists():
        raise no_artifact(path)
    return kind(path)


def no_artifact(path: Path) -> UserError:
    """What to say of a path that is of no format."""
    return UserError(f"{path} is neither a model folder nor a .gguf file", "give one of these")
