"""What `llmc export --format gguf` can be asked for. Importing this imports neither torch nor gguf."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmc.errors import UserError
from llmc.formats.types import BLOCK_TYPES

MATRIX_TYPES = ("f32", "f16", "bf16", "q8_0")
TABLE_TYPES = ("f32", "f16", "bf16", *BLOCK_TYPES)


@dataclass(frozen=True)
class GgufExportConfig:
    """Options of the GGUF exporter; the command line has the same names and defaults."""

    model: Path | str | None = None
    """Model folder, float or quantized (or a hub id). None: the newest artifact made in this working folder."""
    out: Path | None = None
    """The file to write. None: `<model folder>-<file type>.gguf` in the working folder."""
    embedding: str | None = None
    """Type of the token embedding. None: what the folder asks for, else q8_0 with a quantized model and `float_type` with a
    float one."""
    head: str | None = None
    """Type of the output matrix. None: what the folder asks for, else the same as `embedding`.
    A tied model has no output matrix of its own."""
    float_type: str = "f16"
    """Type of the matrices that carry no codes."""
    converter: Path | None = None
    """A llama.cpp checkout whose own converter lays the file out, for architectures that llmc does not know."""
    pre: str | None = None
    """llama.cpp's name of the pre-tokenizer. None: found from tokenizer.json."""
    chat_template: str = "keep"
    """'keep', 'drop', or the path of a Jinja file."""
    threads: int | None = None
    """Threads of the check in llama.cpp and torch. None: this machine's physical cores."""

    def __post_init__(self) -> None:
        wrong = [
            f"{name} {value!r} (one of {', '.join(allowed)})"
            for name, value, allowed in (
                ("--embedding", self.embedding, TABLE_TYPES), ("--head", self.head, TABLE_TYPES),
                ("--float-type", self.float_type, MATRIX_TYPES))
            if value is not None and value not in allowed
        ]
        if self.threads is not None and self.threads < 1:
            wrong.append(f"--threads {self.threads} (1 or more)")
        if wrong:
            raise UserError("not possible: " + "; ".join(wrong), "choose one of the values in brackets")
