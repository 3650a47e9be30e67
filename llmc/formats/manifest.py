"""The manifest of an artifact (`llmc.json`): the record of how llmc made it.

A folder artifact carries `llmc.json` inside; a single-file artifact (`small.gguf`) carries `small.gguf.llmc.json` beside it.
"""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from llmc.errors import UserError
from llmc.files import existing, sha256, write_json

MANIFEST = "llmc.json"
SCHEMA = 1
NOTES = ".llmc"  # folder in the working directory that remembers the newest artifacts


def hash_folder(folder: Path) -> dict[str, str]:
    """{relative POSIX path: sha256} of every file below `folder` except the manifest."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {p.relative_to(folder).as_posix(): sha256(p) for p in files}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect results."""
    found = {"python": platform.python_version()}
    for name in ("llmc-toolkit", "torch", "transformers", "tokenizers", "safetensors", "gguf", "llama-cpp-python",
                 "onnx", "onnx-ir", "onnxruntime", "onnxruntime-genai"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def check_output(out: Path, overwrite: bool = False) -> None:
    """Raises UserError unless `out` is writable and new, empty or an older artifact of llmc. overwrite: allow others."""
    if out.exists() and not overwrite and not manifest_path(out).exists() and (out.is_file() or any(out.iterdir())):
        raise UserError(f"{out} exists and was not made by llmc", "choose another place with -o")
    parent = existing(out.absolute().parent)
    if not os.access(parent, os.W_OK):
        raise UserError(f"no permission to write into {parent}", "choose another place with -o")


def manifest_path(artifact: Path) -> Path:
    """The path of an artifact's manifest."""
    return artifact / MANIFEST if artifact.is_dir() else artifact.with_name(artifact.name + "." + MANIFEST)


def read_manifest(artifact: Path) -> dict[str, Any] | None:
    """The manifest of an artifact, or None if it has none."""
    path = manifest_path(artifact)
    if not path.is_file():
        return None
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise UserError(f"{path} is not valid JSON: {e}", "the artifact is damaged: make it again") from e
    return manifest


def passes_of(artifact: Path) -> list[dict[str, Any]]:
    """The passes of llmc that made an artifact, oldest first; [] if it has no manifest."""
    return list((read_manifest(artifact) or {}).get("passes", []))


def new_manifest(kind: str, source: dict[str, Any], passes: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """A manifest without its output hashes.

    kind: 'hf', 'gptq', 'gguf', …   source: the input (name, sha256s, licence, revision)
    passes: the whole chain, oldest first; each {'name', 'config', … measurements}
    """
    return {"schema": SCHEMA, "kind": kind, "source": source, "passes": passes, "versions": versions(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"), **more}


def note_last(path: Path, kind: str) -> None:
    """Remember `path` as the newest artifact made in this working folder."""
    notes = Path(NOTES)
    notes.mkdir(exist_ok=True)
    write_json(notes / "last.json", {"path": os.path.relpath(path), "kind": kind})


def last_artifact() -> Path:
    """The newest artifact made in this working folder, for commands called without a model."""
    note = Path(NOTES) / "last.json"
    if not note.is_file():
        raise UserError("no MODEL given and no artifact was made in this folder yet",
                        "name a model folder, or run `llmc quantize MODEL` first")
    path = Path(json.loads(note.read_text(encoding="utf-8"))["path"])
    if not path.exists():
        raise UserError(f"the newest artifact made here, {path}, no longer exists", "name a model folder")
    return path
