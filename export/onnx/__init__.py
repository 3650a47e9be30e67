"""ONNX folders for onnxruntime-genai and ONNX Runtime: the codes that a quantizer chose are carried over bit for bit, and a
folder is proved before it is given its name."""

from __future__ import annotations

from typing import Any

from llmc.export.onnx.config import OnnxExportConfig

__all__ = ["OnnxExportConfig", "export_onnx"]


def export_onnx(config: OnnxExportConfig) -> dict[str, Any]:
    """Write a model folder as a folder that onnxruntime-genai runs, verify it, and return the report (JSON-able)."""
    from llmc.export.onnx.export import run

    return run(config)
