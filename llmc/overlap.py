"""Does the calibration text overlap the evaluation text? A small sketch of the one is enough to tell.

A bottom-k sketch (Broder, "On the resemblance and containment of documents", 1997): the k smallest 64-bit hashes of all
runs of `WORDS` words. The share of them that occur in another text estimates the share of runs that do.
"""

from __future__ import annotations

import hashlib
import heapq
import re
from collections.abc import Iterator

WORDS = 13  # GPT-3's contamination study (Brown et al. 2020, appendix C) looks at runs of 13 words
SIZE = 256


def _hashes(text: str) -> Iterator[int]:
    words = re.findall(r"\w+", text.lower())
    for i in range(len(words) - WORDS + 1):
        run = " ".join(words[i : i + WORDS]).encode()
        yield int.from_bytes(hashlib.blake2b(run, digest_size=8).digest(), "big")


def sketch(text: str) -> list[str]:
    """Up to 256 hashes (hex) that stand for the text in a manifest."""
    return [f"{h:016x}" for h in heapq.nsmallest(SIZE, set(_hashes(text)))]


def overlap(calibration_sketch: list[str], text: str) -> float:
    """Share (0 … 1) of the sketched text's 13-word runs that occur in `text`. The standard error is at most 0.03."""
    if not calibration_sketch:
        return 0.0
    wanted = {int(h, 16) for h in calibration_sketch}
    return len(wanted & set(_hashes(text))) / len(wanted)
