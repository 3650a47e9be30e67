"""tokenizer.json, read by the `tokenizers` package without transformers. Devices need this module alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmc.errors import UserError
from llmc.small_files import LARGE, read_text

TOKENIZER = "tokenizer.json"
HINT = "copy the base model's tokenizer files into it"


def open_tokenizer_json(folder: Path) -> Any:
    """The tokenizers.Tokenizer of a folder's tokenizer.json. It neither pads nor truncates, whatever the file says."""
    from tokenizers import Tokenizer

    path = folder / TOKENIZER
    if not path.is_file():
        raise UserError(f"{folder} has no {TOKENIZER}", HINT)
    text = read_text(path, LARGE, HINT)
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as e:
        if type(e) is not Exception:  # the package raises Exception itself
            raise
        raise UserError(f"{path} is no tokenizer: {e}", HINT) from e
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
