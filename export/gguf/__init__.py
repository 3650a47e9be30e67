"""GGUF files for llama.cpp. The codes of a quantized model are copied bit for bit. A file gets its final name only after it
is verified."""

from __future__ import annotations

from typing import Any

from llmc.export.gguf.config import GgufExportConfig

__all__ = ["GgufExportConfig", "export_gguf"]


def export_gguf(config: GgufExportConfig) -> dict[str, Any]:
    """Write a model folder as one .gguf file, verify it, and return the report (JSON-able; see export.py)."""
    from llmc.export.gguf.export import run

    return run(config)
