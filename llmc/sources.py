"""Where a model comes from: turns what the user names (a folder, a .gguf file, a hub id) into a Hugging Face folder on
this disk, and describes that folder for manifests."""

from __future__ import annotations

import os
import re
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.artifact import read_manifest, sha256
from llmc.checkpoint import CARD_FILES, INDEX, TOKENIZER_FILES, Checkpoint
from llmc.console import say, warn
from llmc.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFReader

HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
WHAT_TO_GIVE = "give a Hugging Face folder, a .gguf file or a hub id (org/name)"


def resolve_model(model: str | Path) -> Path:
    """The Hugging Face folder of `model`.

    A folder is itself. A .gguf file is dequantised into the cache. `org/name` or `org/name@revision`, where no such
    path exists, is fetched from the hub: safetensors, JSON, tokenizer and card, nothing else.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix == ".gguf":
            from llmc.dequantize import dequantized_folder

            return dequantized_folder(path)
        raise UserError(f"{model} is neither a model folder nor a .gguf file", WHAT_TO_GIVE)
    if match := HUB_ID.fullmatch(str(model)):
        return _download(match["repo"], match["revision"])
    raise UserError(f"there is no folder or file {model}", WHAT_TO_GIVE)


def cache_folder() -> Path:
    """Where llmc keeps what it can make again: $LLMC_CACHE, else ~/.cache/llmc."""
    return Path(os.environ.get("LLMC_CACHE") or Path.home() / ".cache" / "llmc")


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
    names = ("config.json", "generation_config.json", INDEX, *TOKENIZER_FILES)
    files = [folder / n for n in names if (folder / n).is_file()] + Checkpoint.open(folder).files
    return {p.name: sha256(p) for p in files}


@cache
def _warn_of_no_licence(folder: Path) -> None:
    """Once: some commands describe their source for several manifests."""
    warn(f"no licence found in {folder} (README.md front matter): the manifest says 'unknown'")


TRANSFORMS = ("rotate", "gauge")  # passes that leave a float model's function as it is


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
    import yaml

    if not card.is_file():
        return {}
    text = card.read_text(encoding="utf-8", errors="replace").lstrip("\ufeff")
    match = re.match(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, re.DOTALL)
    try:
        values = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError as e:
        warn(f"the front matter of {card} is not valid YAML and was not read: {str(e).splitlines()[0]}")
        return {}
    return values if isinstance(values, dict) else {}


# ---------------------------------------------------------------------------------------------------------------- hub


def _download(repo: str, revision: str | None) -> Path:
    """A snapshot of the hub's `repo` in huggingface_hub's own cache; offline, a snapshot that is already there."""
    from huggingface_hub import errors, snapshot_download

    say(f"{repo} is no path here: looking for it on the Hugging Face hub")
    try:
        return Path(snapshot_download(
            repo, revision=revision,
            allow_patterns=["*.safetensors", "*.json", *TOKENIZER_FILES, *CARD_FILES],
            ignore_patterns=["*/*", "consolidated*"],  # other formats' folders; Mistral's second copy of the weights
        ))
    except errors.GatedRepoError as e:
        raise UserError(f"{repo} asks for its licence to be accepted first",
                        f"accept it on the hub's page of {repo}, then run `hf auth login`") from e
    except errors.RepositoryNotFoundError as e:
        raise UserError(f"there is no folder {repo} here and no such model on the hub (or it is private)",
                        "check the spelling, or run `hf auth login`") from e
    except errors.RevisionNotFoundError as e:
        raise UserError(f"{repo} has no revision {revision!r}", "give a branch, tag or commit of it") from e
    except errors.HFValidationError as e:
        raise UserError(f"there is no folder {repo} here and it is no hub id: {e}", WHAT_TO_GIVE) from e
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, ConnectionError, TimeoutError) as e:
        raise UserError(f"there is no folder {repo} here and the hub cannot be reached",
                        "give a folder or a .gguf file, or try again online") from e


# --------------------------------------------------------------------------------------------------------------- gguf


def open_gguf(file: Path) -> GGUFReader:
    """A GGUF file's metadata and tensor table (the weights stay on disk until they are touched)."""
    stat = file.stat()
    return _open_gguf(file, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=1)  # reading a vocabulary takes seconds, and one command asks for several things of one file
def _open_gguf(file: Path, modified: int, length: int) -> GGUFReader:
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError as e:
        raise UserError("reading a .gguf file needs the package `gguf`", "pip install 'llmc-toolkit[gguf]'") from e
    try:
        return GGUFReader(file)
    except (ValueError, IndexError, KeyError) as e:
        raise UserError(f"{file} is not a complete GGUF file: {e}", "download or export it again") from e


def field(reader: GGUFReader, key: str) -> Any:
    """A metadata value of a GGUF file, or None."""
    found = reader.get_field(key)
    return None if found is None else found.contents()
