"""The rule for which files of a folder hold its weights. It is transformers' own: model.safetensors, else the index."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from llmc.console import warn
from llmc.errors import UserError
from llmc.formats import layouts
from llmc.small_files import LARGE, read_json_object

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
AGAIN = "download the model again"
PLAIN = re.compile(r"[^/\\\0]+\.safetensors")  # the name of a file beside the index


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
    weight_map = read_json_object(path, LARGE, AGAIN).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path} has no weight_map that names the file of each tensor", AGAIN)
    for n in weight_map.values():
        if not isinstance(n, str) or not PLAIN.fullmatch(n):
            raise UserError(f"{path} points outside the folder: {n!r:.100}",
                            "do not trust this model; shards must be .safetensors files beside the index")
    return weight_map
