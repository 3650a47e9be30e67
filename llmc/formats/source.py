"""What a manifest says of the model that an artifact was made from: name, hashes, licence, revision."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.console import warn
from llmc.errors import UserError
from llmc.files import sha256
from llmc.formats.checkpoint import model_files
from llmc.formats.manifest import read_manifest
from llmc.small_files import parse_yaml

if TYPE_CHECKING:
    pass


COMMIT = re.compile(r"[0-9a-f]{40}")


def describe_source(folder: Path) -> dict[str, Any]:
    """What a manifest says of its input: name, sha256 of each file that decides the model, licence, base model, commit.

    The licence is what the model's card says (or the .gguf said, if it was one), else 'unknown' and a warning.
    """
    name, revision = _name_and_revision(folder)
    before = (read_manifest(folder) or {}).get("source", {})
    card = front_matter(folder / "README.md")
    licence = card.get("license") or before.get("licence") or "unknown"
    if licence == "unknown":
        _warn_of_no_licence(folder)
    return {
        "name": name,
        "files": hash_source(folder),
        "licence": licence,
        "base_model": card.get("base_model") or before.get("base_model"),
        "revision": revision or before.get("revision"),
    }


def hash_source(folder: Path) -> dict[str, str]:
    """sha256 of each file that decides a model, by name."""
    return {p.name: sha256(p) for p in model_files(folder)}


@cache
def _warn_of_no_licence(folder: Path) -> None:
    """Once: some commands describe their source for several manifests."""
    warn(f"no licence found in {folder} (README.md front matter): the manifest says 'unknown'")


TRANSFORMS = ("rotate", "scaling")  # passes that leave a float model's function as it is


def origin_of(folder: Path, described: dict[str, Any] | None = None) -> dict[str, Any]:
    """The float model that a folder stands for: of what `llmc transform` made the model it transformed, else its own
    description (`described`, where that is known already)."""
    manifest = read_manifest(folder) or {}
    if any(p.get("name") in TRANSFORMS for p in manifest.get("passes", [])):
        return dict(manifest["source"])
    return described or describe_source(folder)


def _name_and_revision(folder: Path) -> tuple[str, str | None]:
    """The hub's name and commit of a folder that huggingface_hub laid out, else the folder's own name and None.

    Its cache is `models--org--name/snapshots/<commit>`; with `--local-dir` it leaves the commit on the first line of
    `.cache/huggingface/download/<file>.metadata`.
    """
    path = folder.absolute()
    repo = path.parent.parent.name
    if path.parent.name == "snapshots" and repo.startswith("models--") and COMMIT.fullmatch(path.name):
        return repo.removeprefix("models--").replace("--", "/"), path.name
    note = path / ".cache" / "huggingface" / "download" / "config.json.metadata"
    commit = note.read_text(encoding="utf-8").partition("\n")[0] if note.is_file() else ""
    return path.resolve().name, commit if COMMIT.fullmatch(commit) else None


def front_matter(card: Path) -> dict[str, Any]:
    """The YAML between the first two `---` lines of a model card; empty where there is none."""
    if not card.is_file():
        return {}
    text = card.read_text(encoding="utf-8", errors="replace").lstrip("\ufeff")
    match = re.match(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, re.DOTALL)
    try:
        values = parse_yaml(match[1], f"the front matter of {card}") if match else None
    except UserError as e:
        warn(f"{e.problem.splitlines()[0]}: it was not read")
        return {}
    return values if isinstance(values, dict) else {}
