"""Opens a GGUF file for reading: metadata and tensor table."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.errors import UserError
from llmc.formats.chat_template import DEFAULT, Template, in_one_form
from llmc.formats.gguf_header import read_header

if TYPE_CHECKING:
    from gguf import GGUFReader


def open_gguf(file: Path) -> GGUFReader:
    """The metadata and tensor table of a GGUF file. The weights are mapped and read on access."""
    read_header(file)
    stat = file.stat()
    return _open_gguf(file, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=4)  # reading a vocabulary takes seconds, and a command opens the same file several times
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
    """A metadata value of a GGUF file, or None if it lacks the key."""
    found = reader.get_field(key)
    return None if found is None else found.contents()


def templates(reader: GGUFReader, file: Path) -> Template | None:
    """The chat templates of a file. It has other names than the model where these have odd characters."""
    names = field(reader, "tokenizer.chat_templates") or []
    found = {name: field(reader, f"tokenizer.chat_template.{name}") for name in names}
    found[DEFAULT] = field(reader, "tokenizer.chat_template")
    return in_one_form({name: text for name, text in found.items() if text is not None}, file)
