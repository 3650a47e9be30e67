"""The tokenizer's files of a model folder, as a new folder gets them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path

from llmc.console import warn
from llmc.files import read_json
from llmc.formats.chat_template import NAMED
from llmc.formats.checkpoint import TOKENIZER_FILES
from llmc.formats.tokenizer_json import TOKENIZER

FOR_BATCHES = ("padding", "truncation")  # of training. A runtime that obeys them fills short prompts and cuts long ones


def copy_tokenizer_files(source: Path, folder: Path, without: Collection[str] = ()) -> None:
    """Copy the tokenizer's files byte for byte, chat templates included. tokenizer.json loses padding and truncation.

    without: names of files, or the folder of named chat templates, that are not copied."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file() and name not in without:
            _copy_json(source / name, folder / name) if name == TOKENIZER else shutil.copyfile(source / name, folder / name)
    if NAMED not in without and (templates := sorted((source / NAMED).glob("*.jinja"))):
        (folder / NAMED).mkdir(exist_ok=True)
        for file in templates:
            shutil.copyfile(file, folder / NAMED / file.name)


def _copy_json(source: Path, target: Path) -> None:
    spec = read_json(source)
    found = [key for key in FOR_BATCHES if spec.get(key) is not None]
    if not found:
        shutil.copyfile(source, target)
        return
    warn(f"{source} sets {' and '.join(found)}, which belong to training: they are left out")
    spec |= dict.fromkeys(found)
    target.write_text(json.dumps(spec, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
