"""The facts about a tokenizer that `llmc inspect` shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmc.files import sha256
from llmc.formats.chat_template import hash_template, template_in
from llmc.formats.checkpoint import TOKENIZER_FILES


def of_folder(folder: Path, vocabulary: int | None) -> dict[str, Any]:
    """{'files': {name: sha256}, 'vocabulary', 'chat_template_sha256'} of a folder with tokenizer files."""
    return {
        "files": {n: sha256(folder / n) for n in TOKENIZER_FILES if (folder / n).is_file()},
        "vocabulary": vocabulary,
        "chat_template_sha256": hash_template(template_in(folder)),
    }
