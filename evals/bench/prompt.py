"""The token ids that a bench feeds an artifact: text of its own tokenizer's, made here, so that a device needs none."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from llmc.evals.quality.texts import PYTHON_DOCS, load_text
from llmc.formats.onnx_folder import is_onnx_folder


def prompt_ids(artifact: Path, tokens: int) -> list[int]:
    """The first `tokens` ids of CPython's help text, repeated where it is too short."""
    text = load_text(PYTHON_DOCS)[1][: 8 * tokens + 64]
    return [int(i) for i in np.resize(_encode(artifact, text), tokens)]


def _encode(artifact: Path, text: str) -> np.ndarray:
    if artifact.suffix == ".gguf":
        from llmc.runtimes.llamacpp import tokenize

        return tokenize(artifact, text)
    if is_onnx_folder(artifact):
        from llmc.runtimes.onnx_model import load_tokenizer

        return np.array(load_tokenizer(artifact).encode(text).ids)
    from llmc.formats.hf import load_tokenizer as load

    return np.array(load(artifact)(text)["input_ids"])
