"""A model given by the user (a folder, a .gguf file or a hub id) becomes a Hugging Face folder on this disk."""

from __future__ import annotations

import re
from pathlib import Path

from llmc.console import say
from llmc.errors import UserError
from llmc.formats.artifacts.table import format_of
from llmc.formats.chat_template import NAMED
from llmc.formats.checkpoint import CARD_FILES, TOKENIZER_FILES
from llmc.temporary import restore

# Endings of files and folders that llmc reads or writes. A hub id with one of them is most likely a path with a mistake.
ENDINGS = (".gguf", ".onnx", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json", ".jsonl", ".yaml", ".yml", ".toml",
           ".txt", ".md", ".npz", ".zip", ".tar", ".gz")
HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?")
# every folder but NAMED, in fnmatch's words: it leaves NAMED's spelling at some letter, or ends before it, or goes on
OTHER_FOLDERS = [*(f"{NAMED[:i]}[!{c}]*/*" for i, c in enumerate(NAMED)),
                 *(f"{NAMED[:i]}/*" for i in range(1, len(NAMED))), f"{NAMED}?*/*"]
WHAT_TO_GIVE = "give a Hugging Face folder, a .gguf file or a hub id (org/name)"


def resolve_model(model: str | Path) -> Path:
    """The Hugging Face folder of `model`.

    A folder is returned as it is. A .gguf file is dequantized into the cache. `org/name` or `org/name@revision`, if no such
    path exists, is downloaded from the hub: only safetensors, JSON, tokenizer and card. A name that is plainly meant as a
    path is never looked for on the hub.
    """
    path = given_path(model)
    restore(path)
    if path.is_dir():
        return path
    if path.is_file():
        kind = format_of(path)
        if kind is not None and kind.format == "gguf":
            from llmc.sources.dequantize import dequantized_folder

            return dequantized_folder(path)
        raise UserError(f"{model} is neither a model folder nor a .gguf file", WHAT_TO_GIVE)
    if match := HUB_ID.fullmatch(str(model)):
        if match["revision"] is None and (why := _meant_as_path(path)):
            raise UserError(f"there is no folder or file {model}; it is not looked for on the hub, because {why}",
                            f"correct the path, or write {model}@main for the hub's model")
        return _download(match["repo"], match["revision"])
    raise UserError(f"there is no folder or file {model}", WHAT_TO_GIVE)


def given_path(model: str | Path) -> Path:
    """The path that a user named, `~` expanded. Raises UserError if the system can have no such path."""
    try:
        path = Path(model).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as e:  # a name too long, no such user, a null character
        raise UserError(f"{str(model)[:80]!r} cannot be a path here: {e}", WHAT_TO_GIVE) from e
    return path


def _meant_as_path(path: Path) -> str | None:
    """Why `a/b`, which does not exist, is meant as a path and not as a hub id; None if nothing tells."""
    if path.suffix.lower() in ENDINGS:
        return f"it ends in {path.suffix}"
    return f"there is a folder {path.parent} here" if path.parent.is_dir() else None


# ---------------------------------------------------------------------------------------------------------------- hub


def _download(repo: str, revision: str | None) -> Path:
    """Download a snapshot of the hub's `repo` into huggingface_hub's cache. Offline, use a snapshot that is in the cache."""
    from huggingface_hub import errors, snapshot_download

    say(f"there is no path {repo} here: looking for it on the Hugging Face hub")
    try:
        return Path(snapshot_download(
            repo, revision=revision,
            allow_patterns=["*.safetensors", "*.json", *TOKENIZER_FILES, *CARD_FILES, f"{NAMED}/*.jinja"],
            ignore_patterns=[*OTHER_FOLDERS, "consolidated*"],  # of other formats; Mistral's second copy of the weights
        ))
    except errors.GatedRepoError as e:
        raise UserError(f"{repo} requires that you accept its licence first",
                        f"accept it on the hub's page of {repo}, then run `hf auth login`") from e
    except errors.RepositoryNotFoundError as e:
        raise UserError(f"there is no folder {repo} here and no such model on the hub (or it is private)",
                        "check the spelling, or run `hf auth login`") from e
    except errors.RevisionNotFoundError as e:
        raise UserError(f"{repo} has no revision {revision!r}", "give a branch, tag or commit of it") from e
    except errors.HFValidationError as e:
        raise UserError(f"there is no folder {repo} here and it is not a hub id: {e}", WHAT_TO_GIVE) from e
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, ConnectionError, TimeoutError) as e:
        raise UserError(f"there is no folder {repo} here and the hub cannot be reached",
                        "give a folder or a .gguf file, or try again online") from e


# --------------------------------------------------------------------------------------------------------------- gguf


def locate(artifact: str) -> Path:
    """The file or folder of the user's artifact: an artifact does not change, a hub id becomes its folder."""
    path = given_path(artifact)
    restore(path)
    return path if path.exists() and format_of(path) else resolve_model(artifact)
