"""tokenizer.json, read by the `tokenizers` package without transformers. Devices need this module alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmc.errors import UserError

TOKENIZER = "tokenizer.json"


def open_tokenizer_json(folder: Path) -> Any:
    """The tokenizers.Tokenizer of a folder's tokenizer.json. It neither pads nor truncates, whatever the file says."""
    from tokenizers import Tokenizer

    path = folder / TOKENIZER
    if not path.is_file():
        raise UserError(f"{folder} has no {TOKENIZER}", "copy the base model's tokenizer files into it")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
