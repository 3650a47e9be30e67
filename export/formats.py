"""The formats that llmc writes, one row for each: config, function, and facts about the result for recipes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmc.export.gguf import GgufExportConfig, export_gguf
from llmc.export.onnx import OnnxExportConfig, export_onnx


@dataclass(frozen=True)
class Format:
    """config: the class of its options. write: the exporter, from a config to its report. called: an artifact's name in
    messages. suffix: the end of its file name ('' for a folder). needs: packages to import. code: the exporter's module."""

    config: type
    write: Callable[[Any], dict[str, Any]]
    called: str
    suffix: str
    needs: tuple[str, ...]
    code: str


FORMATS: dict[str, Format] = {
    "gguf": Format(GgufExportConfig, export_gguf, "a .gguf file", ".gguf", ("gguf", "llama_cpp"), "llmc.export.gguf.export"),
    "onnx": Format(OnnxExportConfig, export_onnx, "an ONNX folder", "", ("onnx", "onnxruntime", "onnxruntime_genai"),
                   "llmc.export.onnx.export"),
}
