"""No network unless it is asked for: the telemetry of the libraries that llmc loads is off.

onnxruntime 1.31 and onnxruntime-genai 0.18 look up a host of Microsoft's and write a device id under HOME as soon as they are
loaded. They read the environment at that moment, so it must be set before; child processes inherit it.
"""

from __future__ import annotations

import os

OFF = {
    "ORT_DISABLE_TELEMETRY": "1",  # onnxruntime, onnxruntime-genai
    "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface_hub, transformers, datasets
    "RAY_USAGE_STATS_ENABLED": "0",  # ray
    "DO_NOT_TRACK": "1",  # others
}


def telemetry_off() -> None:
    """Switch telemetry off for the libraries that this process and its children load from now on."""
    os.environ.update(OFF)
