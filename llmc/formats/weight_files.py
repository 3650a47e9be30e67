"""The rule for which files of a folder hold its weights. It is transformers' own: model.safetensors, else the index."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from llmc.console import warn
from llmc.errors import UserError
from llmc.formats import layouts

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The files that hold the weights, in order, and the map of the index {tensor: file name}; {} if no index is used.

    Raises UserError if a file is missing or outside the folder. Prints a warning that names the other safetensors files of
    the folder, and an index beside model.safetensors that names others.
    """
    single, index = (folder / SINGLE).is_file(), (folder / INDEX).is_file()
    weight_map = _weight_map(folder) if index else {}
    names = [SINGLE] if single else sorted(set(weight_map.values()))
    if not names:
        raise layouts.no_weights(folder)
    if lost := next((n for n in names if not (folder / n).is_file()), None):
        raise UserError(f"the shard {lost} is missing from {folder}", "download the whole model folder again")
    left = sorted(p.name for p in folder.glob("*.safetensors") if p.name not in names)
    if single and weight_map and set(weight_map.values()) != {SINGLE}:
        left.insert(0, INDEX)
    if left:
        _warn_of_leftovers(folder, tuple(left), SINGLE if single else INDEX)
    return [folder / n for n in names], {} if single else weight_map


@cache
def _warn_of_leftovers(folder: Path, names: tuple[str, ...], read: str) -> None:
    """Warn once per folder: a command opens it several times."""
    warn(f"{folder}: the weights are those of {read}, as in transformers; {len(names)} other files are not read: "
         f"{layouts.listed(names)}")


def _weight_map(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    try:
        weight_map: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = set(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{path} is damaged", "download the model again") from e
    for n in names:
        if not isinstance(n, str) or "/" in n or "\\" in n or n in ("", "..") or not n.endswith(".safetensors"):
            raise UserError(f"{path} points outside the folder: {n!r}",
                            "do not trust this model; shards must be .safetensors files beside the index")
    return weight_map
