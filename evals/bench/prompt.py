"""The token ids that a bench feeds to an artifact. They are made on the host, so a device needs no tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from llmc.evals.quality.texts import PYTHON_DOCS, load_text
from llmc.runtimes.open import token_ids


def prompt_ids(artifact: Path, tokens: int) -> list[int]:
    """The first `tokens` ids of CPython's help text in the artifact's own tokenizer. A text that is too short is repeated."""
    text = load_text(PYTHON_DOCS)[1][: 8 * tokens + 64]
    return [int(i) for i in np.resize(token_ids(artifact, text), tokens)]
