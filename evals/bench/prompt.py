"""The token ids that a bench feeds an artifact: text of its own tokenizer's, made here, so that a device needs none."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from llmc.evals.quality.texts import PYTHON_DOCS, load_text
from llmc.runtimes.open import token_ids


def prompt_ids(artifact: Path, tokens: int) -> list[int]:
    """The first `tokens` ids of CPython's help text, repeated where it is too short."""
    text = load_text(PYTHON_DOCS)[1][: 8 * tokens + 64]
    return [int(i) for i in np.resize(token_ids(artifact, text), tokens)]
