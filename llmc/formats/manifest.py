"""The manifest of an artifact (`llmc.json`): the record of how llmc made it.

A folder artifact carries `llmc.json` inside; a single-file artifact (`small.gguf`) carries `small.gguf.llmc.json` beside it.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from llmc.errors import UserError
from llmc.files import sha256, staged_file, write_json, write_note
from llmc.locks import locked
from llmc.places import ELSEWHERE, check_place
from llmc.small_files import DELETE, LARGE, OBJECT, TEXT, Kind, expect, read_json_object
from llmc.temporary import remove, restore

MANIFEST = "llmc.json"
SCHEMA = 1
DAMAGED = "the artifact is damaged: make it again"
NOTES = ".llmc"  # folder in the working directory that remembers the newest artifacts
FILES = ("gguf", "imatrix")  # kinds of one file; others are folders
# What a message calls an artifact of each kind. Those with one name may replace each other.
KINDS = {"hf": "a float model", "gptq": "a quantized model", "blocks": "a quantized model", "gguf": "a .gguf file",
         "imatrix": "an importance matrix", "onnx": "an ONNX folder"}


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


def check_output(out: Path | None, kind: str | None = None, *inputs: Any) -> None:
    """Raise UserError unless an artifact of this kind can be written at `out`: nothing is there, or an older one of its kind.

    kind: 'hf', 'gptq', 'gguf', … None: any. inputs: what is read, as of `check_place`. out: None if the
    command finds a name later.
    """
    if out is None:
        return
    check_place(out, inputs, folder=None if kind is None else kind not in FILES)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not manifest_path(out).exists():
        raise UserError(f"{out} exists and was not made by llmc", ELSEWHERE)
    before = (read_manifest(out) or {}).get("kind")
    if kind and before and KINDS.get(before, before) != KINDS[kind]:
        raise UserError(f"{out} is {KINDS.get(before, before)}, and {KINDS[kind]} would replace it",
                        f"{ELSEWHERE}, or remove that one")


def manifest_path(artifact: Path) -> Path:
    """The path of an artifact's manifest."""
    return artifact / MANIFEST if artifact.is_dir() else artifact.with_name(artifact.name + "." + MANIFEST)


def read_manifest(artifact: Path) -> dict[str, Any] | None:
    """The manifest of an artifact, or None if it has none."""
    path = manifest_path(artifact)
    if not path.is_file():
        return None
    manifest = read_json_object(path, LARGE, DAMAGED)
    expect(path, manifest, {"passes": Kind("a list of objects", (dict,), listed=True), "source": OBJECT, "outputs": OBJECT,
                            "kind": TEXT}, DAMAGED)
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


@contextmanager
def staged_artifact(out: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """`staged_file` for an artifact with a manifest beside it: yields the temporary file, and a dict for the manifest.

    The block fills the dict by `new_manifest`, without 'outputs'. The manifest gets its name first. So a run that dies
    between the two leaves a manifest whose hash does not fit the older file, or no file. It never leaves a wrong pair.
    """
    path, manifest = manifest_path(out), dict[str, Any]()
    with locked(out):  # two writers would make a wrong pair of file and manifest
        alone = not os.path.lexists(path) and not os.path.lexists(out)
        try:
            with staged_file(out) as tmp:
                yield tmp, manifest
                write_json(path, {**manifest, "outputs": {out.name: sha256(tmp)}})
        finally:
            if alone and not os.path.lexists(out):
                remove(path)


def note_last(path: Path, kind: str) -> None:
    """Remember `path` as the newest artifact made in this working folder."""
    write_note(Path(NOTES) / "last.json", {"path": os.path.relpath(path), "kind": kind})


def last_artifact() -> Path:
    """The newest artifact made in this working folder, for commands called without a model."""
    note = Path(NOTES) / "last.json"
    if not note.is_file():
        raise UserError("no MODEL given and no artifact was made in this folder yet",
                        "name a model folder, or run `llmc quantize MODEL` first")
    path = Path(str(read_json_object(note, hint=DELETE).get("path")))
    restore(path)
    if not path.exists():
        raise UserError(f"the newest artifact made here, {path}, no longer exists", "name a model folder")
    return path
