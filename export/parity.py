"""The comparison of an exported file with its source: texts, token ids and logits, the same for every exporter."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from llmc.formats.check_text import CHECK_TEXT

PLEASE_REPORT = "please report this with the model's name: the file was not kept"
PROMPT = "The river's level rose"
GENERATED = 16
FEW, MANY = 32, 128  # tokens of the logits check: FEW if the model has more than BIG weights
BIG = 3_000_000_000
BEYOND = 64  # tokens after a sliding window
LONGEST = 4096  # tokens of a window that a text is made for
PATIENT = 5e12  # weights times tokens at most, for a text longer than a window: a minute or two of torch
STEP = 97


def check_ids(tokenizer: Any, weights: int, context_length: int, window: int = 0) -> np.ndarray:
    """The token ids of the logits check, int64 [n]. window: the runtime's sliding window, which the text exceeds unless that
    would take too long."""
    n = FEW if weights > BIG else MANY
    if window <= LONGEST and (window + BEYOND) * weights <= PATIENT:
        n = max(n, window + BEYOND)
    text = CHECK_TEXT
    ids = list(tokenizer(text)["input_ids"])
    for start in itertools.count(STEP, STEP):  # each time the text begins at another place
        if len(ids) >= min(n, context_length):
            break
        start %= len(CHECK_TEXT)
        text += "\n" + CHECK_TEXT[start:] + CHECK_TEXT[:start]
        ids = list(tokenizer(text)["input_ids"])
    return np.array(ids[: min(n, context_length)])


def compare_logits(expected: np.ndarray, found: np.ndarray) -> tuple[float, float, float]:
    """Compare the logits [n, vocab] of torch and of a runtime for the same ids.

    Returns the relative error (RMS of the difference / RMS of the logits, both centred for each token), the mean KL
    divergence in nats and the top-1 agreement, 0 to 1."""
    rows = np.array([_compare_token(a, b) for a, b in zip(expected, found, strict=True)])
    kld, top1 = (float(x) for x in rows[:, 2:].mean(axis=0))
    return float(np.sqrt(rows[:, 0].sum() / rows[:, 1].sum())), kld, top1


def _compare_token(expected: np.ndarray, found: np.ndarray) -> tuple[float, float, float, bool]:
    """Compare two logits [vocab]: squared difference and squared norm (both centred), KL divergence in nats, same top-1."""
    a, b = (x.astype(np.float64) - x.mean(dtype=np.float64) for x in (expected, found))
    p, q = (x - x.max() - np.log(np.exp(x - x.max()).sum()) for x in (a, b))
    return ((a - b) ** 2).sum(), (a**2).sum(), (np.exp(p) * (p - q)).sum(), expected.argmax() == found.argmax()


def first_difference(a: list[int], b: list[int]) -> tuple[int] | None:
    """The index of the first difference, in a tuple (so that 0 counts as true); None if the lists are equal."""
    if a == b:
        return None
    return (next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))),)


def show(at: int, expected: list[int], found: list[int], tokenizer: Any) -> str:
    """Describe the tokens on both sides at position `at`, with the text before it."""
    def tokens(ids: list[int]) -> list[str]:
        return [str(*tokenizer.convert_ids_to_tokens([i])) if i >= 0 else "no token" for i in ids[at : at + 3]]

    return (f"after {tokenizer.decode(expected[max(0, at - 8) : at])!r} it gives {tokens(found)} instead of "
            f"{tokens(expected)} (token {at} of {len(expected)})")
