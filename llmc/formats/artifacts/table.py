"""The table of artifact formats, and the format of a path."""

from __future__ import annotations

from pathlib import Path

from llmc.errors import UserError
from llmc.formats.artifact import Artifact
from llmc.formats.artifacts.folder import FolderArtifact
from llmc.formats.artifacts.gguf import GgufArtifact
from llmc.formats.artifacts.onnx import OnnxArtifact
from llmc.temporary import restore

# The first class that recognises a path is its format. FolderArtifact accepts every folder, so it is the last.
FORMATS: tuple[type[Artifact], ...] = (GgufArtifact, OnnxArtifact, FolderArtifact)


def format_of(path: Path) -> type[Artifact] | None:
    """The format of a path, or None. The path need not exist."""
    return next((cls for cls in FORMATS if cls.recognises(path)), None)


def artifact_at(path: Path) -> Artifact:
    """The artifact at a path. Raises UserError if there is none."""
    restore(path)
    cls = format_of(path)
    if cls is None or not (path.is_file() or path.is_dir()):
        raise no_artifact(path)
    return cls(path)


def no_artifact(path: Path) -> UserError:
    """The error for a path that has no format of the table."""
    return UserError(f"{path} is neither a model folder nor a .gguf file", "give one of these")
