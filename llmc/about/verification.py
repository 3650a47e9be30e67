"""`llmc verify`: compare an artifact with its manifest, and check its contents for errors."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from llmc.errors import UserError
from llmc.files import sha256
from llmc.formats.artifact import collected
from llmc.formats.artifacts.table import artifact_at
from llmc.formats.manifest import MANIFEST, hash_folder, manifest_path, read_manifest
from llmc.temporary import restore


def verify(artifact: str | Path) -> dict[str, Any]:
    """Check an artifact's files against its manifest and against each other. It works offline and changes nothing.

    Returns {'artifact', 'kind', 'files' (how many were hashed), 'problems' (one line each)}.
    """
    path = Path(artifact)
    restore(path)
    if not (path.is_file() or path.is_dir()):
        raise UserError(f"there is no artifact {artifact}", "give a model folder or a .gguf file")
    problems: list[str] = []
    manifest = collected(problems, partial(read_manifest, path)) or {}
    found = hash_folder(path) if path.is_dir() else {path.name: sha256(path)}
    if manifest:
        problems += _against_manifest(found, manifest.get("outputs"))
    elif not problems:
        problems.append(f"there is no {manifest_path(path)}: llmc did not make this, or its manifest was lost")
    collected(problems, lambda: problems.extend(artifact_at(path).problems()))
    return {"artifact": str(artifact), "kind": manifest.get("kind"), "files": len(found), "problems": problems}


def _against_manifest(found: dict[str, str], outputs: dict[str, str] | None) -> Iterator[str]:
    """Files that changed, are missing or were added since the manifest was written."""
    if not outputs:
        yield f"{MANIFEST} lists no output files"
        return
    if len(found) == len(outputs) == 1:  # a single file keeps its identity when it and its manifest are renamed
        outputs = dict.fromkeys(found, next(iter(outputs.values())))
    for name in sorted(outputs.keys() | found.keys()):
        if name not in found:
            yield f"{name} is missing"
        elif name not in outputs:
            yield f"{name} is not in {MANIFEST}: it was added afterwards"
        elif found[name] != outputs[name]:
            yield f"{name} has changed: sha256 {found[name][:16]}…, {MANIFEST} says {outputs[name][:16]}…"
