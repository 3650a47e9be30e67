"""The facts about a tokenizer that `llmc inspect` shows."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from llmc.files import read_json, sha256
from llmc.formats.checkpoint import TOKENIZER_FILES


def of_folder(folder: Path, vocabulary: int | None) -> dict[str, Any]:
    """{'files': {name: sha256}, 'vocabulary', 'chat_template_sha256'} of a folder with tokenizer files."""
    return {
        "files": {n: sha256(folder / n) for n in TOKENIZER_FILES if (folder / n).is_file()},
        "vocabulary": vocabulary,
        "chat_template_sha256": hash_text(_template(folder)),
    }


def hash_text(text: str | None) -> str | None:
    """sha256 of a text."""
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


def _template(folder: Path) -> str | None:
    """The chat template, from its own file or from tokenizer_config.json."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = read_json(folder / "tokenizer_config.json").get("chat_template")
    return json.dumps(template) if isinstance(template, list) else template  # a list holds several named templates
