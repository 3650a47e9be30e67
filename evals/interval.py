"""The interval of a measured figure, and whether it meets a limit: one rule for `llmc fit`, `llmc compare` and `llmc ship`.

A limit is met (`yes`) if the whole interval meets it, and missed (`no`) if no part of it does. If the limit lies inside the
interval, the measurement does not decide (`maybe`). Only `yes` passes a gate.
"""

from __future__ import annotations

from llmc.evals.fit.schema import Answer
from llmc.evals.report.schema import Stat

Interval = tuple[float, float, float]
"""Low, middle, high."""
TWO_SIGMA = 2.0
UNDECIDED = "not decided: the limit lies inside the interval"


def around(stat: Stat, least: float = float("-inf"), less: float = 0.0) -> Interval:
    """The value less `less`, minus and plus two standard errors, and not below `least`. Without a standard error it has no
    width."""
    value, width = stat["value"] - less, TWO_SIGMA * (stat["se"] or 0.0)
    return max(least, value - width), max(least, value), max(least, value + width)


def meets(interval: Interval, limit: float, most: bool) -> Answer:
    """Whether the interval meets the limit. most: the limit is an upper one."""
    low, _, high = interval
    if high <= limit if most else low >= limit:
        return "yes"
    return "maybe" if (low <= limit if most else high >= limit) else "no"
