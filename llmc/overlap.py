"""The overlap of calibration text and evaluation text, estimated from a small sketch of the calibration text.

It is a bottom-k sketch (Broder, "On the resemblance and containment of documents", 1997): the k smallest 64-bit hashes of all
n-grams of `NGRAM` words. The share of them that occur in another text estimates the share of n-grams that occur there.
"""

from __future__ import annotations

import hashlib
import heapq
import re
from collections.abc import Iterator

NGRAM = 13  # words, as in GPT-3's contamination study (Brown et al. 2020, appendix C)
SIZE = 256


def _hashes(text: str) -> Iterator[int]:
    words = re.findall(r"\w+", text.lower())
    for i in range(len(words) - NGRAM + 1):
        ngram = " ".join(words[i : i + NGRAM]).encode()
        yield int.from_bytes(hashlib.blake2b(ngram, digest_size=8).digest(), "big")


def sketch(text: str) -> list[str]:
    """The sketch of a text for a manifest: up to 256 hashes in hex."""
    return [f"{h:016x}" for h in heapq.nsmallest(SIZE, set(_hashes(text)))]


def overlap(calibration_sketch: list[str], text: str) -> float:
    """The estimated share, 0 to 1, of the sketched text's 13-grams that occur in `text`; standard error at most 0.03."""
    if not calibration_sketch:
        return 0.0
    wanted = {int(h, 16) for h in calibration_sketch}
    return len(wanted & set(_hashes(text))) / len(wanted)
