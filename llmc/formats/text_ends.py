"""What a tokenizer puts before and after a text. Every text that llmc gives to a model begins by this rule."""

from __future__ import annotations

from typing import Any

import numpy as np


def bos_of(tokenizer: Any) -> int | None:
    """The BOS that a tokenizer of transformers puts before a text; None if it puts none."""
    ids, bos = tokenizer("a")["input_ids"], tokenizer.bos_token_id
    return bos if bos is not None and ids[0] == bos else None


def eos_of(tokenizer: Any) -> int | None:
    """The token that a tokenizer of transformers puts after a text; None if it puts none."""
    bare, ids = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    return int(ids[-1]) if len(ids) > len(bare) and ids[-1] != bare[-1] else None


def note_of_eos(tokenizer: Any) -> list[str]:
    """A note if the tokenizer adds a token after every text."""
    end = eos_of(tokenizer)
    if end is None:
        return []
    return [f"the tokenizer puts {tokenizer.convert_ids_to_tokens(end)!r} after every text, and the file says so too: a "
            "runtime that adds it to a prompt asks the model to go on after its own end"]


def sequences(ids: np.ndarray, length: int, bos: Any) -> np.ndarray:
    """Cut a text, [n], into sequences [m, length] that begin as the tokenizer begins a text. What is left over is dropped.

    bos: stands before the text and replaces the first token of each sequence. None: nothing is added or replaced."""
    if bos is not None:
        ids = np.concatenate([np.array([bos], dtype=ids.dtype), ids])
    cut = ids[: len(ids) // length * length].reshape(-1, length).copy()
    if bos is not None:
        cut[:, 0] = bos
    return cut
