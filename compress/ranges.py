"""What the numbers of calibrated commands may be: checked in one place, said in the same words everywhere."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

SEQ_LEN = range(16, 32768 + 1)
PRECISIONS = ("auto", "bf16", "fp32")  # of products in training


def out_of_range(config: Any, counts: Iterable[str], shares: Iterable[str] = ()) -> list[str]:
    """The problems of `config`'s seq_len, of its threads (None: all cores), of its `counts` (at least 1) and its `shares`
    (above 0 and below 1), one line each."""
    given = [*counts, *(["threads"] if config.threads is not None else [])]
    problems = [f"{_option(name)} {getattr(config, name)}: must be at least 1" for name in given if getattr(config, name) < 1]
    problems += [f"{_option(name)} {getattr(config, name)}: must lie between 0 and 1" for name in shares
                 if not 0 < getattr(config, name) < 1]
    if config.seq_len not in SEQ_LEN:
        problems.append(f"--seq-len {config.seq_len}: must be {SEQ_LEN[0]} … {SEQ_LEN[-1]}")
    return problems


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
