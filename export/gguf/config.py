"""The options of `llmc export --format gguf`. Importing this imports neither torch nor gguf."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmc import options
from llmc.formats.types import BLOCK_TYPES
from llmc.options import Wrong, check, option

GGUF = "GGUF"  # the options' group in --help
MATRIX_TYPES = ("f32", "f16", "bf16", "q8_0")
END_TYPES = ("f32", "f16", "bf16", *BLOCK_TYPES)


@dataclass(frozen=True, kw_only=True)
class GgufExportConfig:
    """The options of the GGUF exporter."""

    model: Path | str | None = option(
        None, help="A model folder (float or quantized) or a hub id. Default: the newest model made in this working folder.",
        argument=True)
    out: Path | None = options.out(
        "File (gguf) or folder (onnx) to write.", "MODEL-TYPE.gguf or MODEL-onnx, in the working folder")
    embedding: str | None = option(
        None, help="Type of the token embedding.", choices=END_TYPES, group=GGUF,
        shown="the type of a preset or budget; else chosen beside a quantized decoder; else --float-type")
    head: str | None = option(
        None, help="Type of the output matrix. A tied model has no output matrix of its own.", choices=END_TYPES,
        group=GGUF, shown="the type of a preset or budget; else chosen beside a quantized decoder; else --embedding")
    float_type: str = option("f16", help="Type of matrices that are not quantized.", choices=MATRIX_TYPES, group=GGUF)
    mmproj: str | None = option(
        None, help="Also write the vision or audio part of a multimodal model, in this type, as mmproj-NAME-f16.gguf "
                   "beside it.",
        choices=MATRIX_TYPES, group=GGUF, shown="not written")
    converter: Path | None = option(
        None, help="A llama.cpp checkout, whose converter lays out the file. Its Python code is executed.",
        group=GGUF, shown="that of `llmc setup converter`, for architectures that llmc cannot write itself")
    pre: str | None = option(
        None, help="llama.cpp's name of the pre-tokenizer.", group=GGUF, metavar="NAME", shown="found from tokenizer.json")
    chat_template: str = option(
        "keep", help="Chat template of the result: keep, drop, or a Jinja file.", metavar="keep|drop|FILE")
    threads: int | None = options.threads("Number of CPU threads of the checks.")
    dry_run: bool = options.dry_run()

    def __post_init__(self) -> None:
        check(self, "export", word=Wrong.out_of_range)
