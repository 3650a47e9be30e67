"""The GPUs that the runtimes installed here can use."""

from __future__ import annotations

from typing import Any

from llmc.errors import UserError
from llmc.machine import _read
from llmc.runtimes.onnx_session import GPUS, library


def gpus() -> list[dict[str, Any]]:
    """The GPUs that the installed runtimes can use: [{name, driver, backend}]."""
    found = []
    try:
        from llmc.runtimes.llamacpp import gpu_devices

        found += gpu_devices()
    except UserError:
        pass  # no llama.cpp here
    try:
        onnxruntime = library()
    except UserError:
        return found  # no onnxruntime here
    driver = _read("/proc/driver/nvidia/version").partition("\n")[0] or None
    return found + [{"name": p.removesuffix("ExecutionProvider"), "driver": driver if "CUDA" in p else None,
                     "backend": "onnxruntime"} for p in onnxruntime.get_available_providers() if p in GPUS]
