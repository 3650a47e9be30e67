"""ONNX folders for onnxruntime-genai and ONNX Runtime. The codes of a quantized model are copied bit for bit. A folder gets
its final name only after it is verified."""

from __future__ import annotations

from typing import Any

from llmc.export.onnx.config import OnnxExportConfig

__all__ = ["OnnxExportConfig", "export_onnx"]


def export_onnx(config: OnnxExportConfig) -> dict[str, Any]:
    """Write a model folder as an ONNX folder, verify it, and return the report (JSON-able)."""
    from llmc.export.onnx.export import run

    return run(config)
