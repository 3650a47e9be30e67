"""Folders that llmc writes name no code: `auto_map` makes transformers run Python files of a model, if a user allows it."""

from __future__ import annotations

import json
from pathlib import Path

from llmc.console import warn
from llmc.files import read_json

KEY = "auto_map"
FILES = ("config.json", "tokenizer_config.json", "generation_config.json", "quantize_config.json")


def remove_code(folder: Path, name: str) -> None:
    """Take `auto_map` out of the JSON files of a folder that is being written, and say so. Other files keep their bytes.

    name: what the folder is called for the user.
    """
    for file in FILES:
        values = read_json(folder / file)
        if (found := values.pop(KEY, None)) is not None:
            text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
            (folder / file).write_text(text, encoding="utf-8", newline="\n")
            what = ", ".join(map(str, found.values())) if isinstance(found, dict) else found
            warn(f"{file} of {name} names code of the model ({what}): auto_map is left out, and the code is not copied")
