"""The source entry of a manifest: name, hashes, licence and revision of the model that an artifact was made from."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from llmc.console import warn
from llmc.errors import UserError
from llmc.files import sha256
from llmc.formats.checkpoint import model_files
from llmc.formats.manifest import read_manifest
from llmc.small_files import parse_yaml, read_bytes, read_text

COMMIT = re.compile(r"[0-9a-f]{40}")


def describe_source(folder: Path) -> dict[str, Any]:
    """The source entry of a manifest: {'name', 'files' ({name: sha256}), 'licence', 'base_model', 'revision' (commit)}.

    The licence is that of the model card, or of the .gguf file that was dequantized. If neither states one, it is
    'unknown', and a warning is printed.
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
    """{file name: sha256} of the files that define a model."""
    return {p.name: sha256(p) for p in model_files(folder)}


@cache
def _warn_of_no_licence(folder: Path) -> None:
    """Warn once per folder: some commands describe their source for several manifests."""
    warn(f"no licence found in {folder} (README.md front matter): the manifest says 'unknown'")


TRANSFORMS = ("rotate", "scaling")  # passes that keep the outputs of a float model


def origin_of(folder: Path, described: dict[str, Any] | None = None) -> dict[str, Any]:
    """The source entry of the original float model: the model that `llmc transform` read, or else the folder itself.

    described: the folder's own entry, if it is known already.
    """
    manifest = read_manifest(folder) or {}
    if any(p.get("name") in TRANSFORMS for p in manifest.get("passes", [])):
        return dict(manifest["source"])
    return described or describe_source(folder)


def model_name(folder: Path) -> str:
    """The name for what is made of a folder: its own, or the model's if it is a snapshot in the hub's cache."""
    name, _ = _name_and_revision(folder)
    return name.rpartition("/")[2]


def _name_and_revision(folder: Path) -> tuple[str, str | None]:
    """The hub's name and commit of a folder that huggingface_hub downloaded, else the folder's own name and None.

    Its cache is `models--org--name/snapshots/<commit>`; with `--local-dir` it leaves the commit on the first line of
    `.cache/huggingface/download/<file>.metadata`.
    """
    path = folder.absolute()
    repo = path.parent.parent.name
    if path.parent.name == "snapshots" and repo.startswith("models--") and COMMIT.fullmatch(path.name):
        return repo.removeprefix("models--").replace("--", "/"), path.name
    note = path / ".cache" / "huggingface" / "download" / "config.json.metadata"
    try:
        commit = read_text(note).partition("\n")[0] if note.is_file() else ""
    except UserError as e:
        warn(f"{e.problem}: the model's revision is not known")
        commit = ""
    return path.resolve().name, commit if COMMIT.fullmatch(commit) else None


def front_matter(card: Path) -> dict[str, Any]:
    """The YAML between the first two `---` lines of a model card; {} if there is none."""
    if not card.is_file():
        return {}
    try:
        text = read_bytes(card).decode(errors="replace").lstrip("\ufeff")
        match = re.match(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, re.DOTALL)
        values = parse_yaml(match[1], f"the front matter of {card}") if match else None
    except UserError as e:
        warn(f"{e.problem.splitlines()[0]}: it was not read")
        return {}
    return values if isinstance(values, dict) else {}
