"""Repetitions as figures: median and spread, and why they are not to be trusted where they are not."""

from __future__ import annotations

from typing import Any

import numpy as np

TIGHT = 0.015
"""Half-width of a median's interval / median that is asked for: two such medians of one thing differ by less than 3 %."""
DRIFT = 0.05  # least-squares line, first to last repetition / median, past which a speed is no figure


def spread(values: np.ndarray) -> dict[str, Any]:
    """{median, iqr, values}."""
    low, median, high = (float(x) for x in np.percentile(values, (25, 50, 75)))
    return {"median": median, "iqr": high - low, "values": [float(v) for v in values]}


def half_width(s: dict[str, Any]) -> float:
    """Of the median's interval, over the median: the notch of McGill, Tukey and Larsen (1978), 1.57 IQR / sqrt(n). Those of two
    medians of one thing overlap 95 times in 100."""
    return float(1.57 * s["iqr"] / np.sqrt(len(s["values"])) / s["median"])


def drift(s: dict[str, Any]) -> float:
    """Change from the first to the last repetition by a least-squares line, over the median."""
    n = len(s["values"])
    return float(np.polyfit(np.arange(n), s["values"], 1)[0]) * (n - 1) / float(s["median"])


def curves(runs: list[dict[str, Any]], generate: int) -> dict[str, Any]:
    """`prefill_curve` and `decode_curve` (tokens/s, and s to the first token) of the answers of bench_child."""
    prefill, decode = [], []
    for n in runs[0]["first_token_s"]:
        first = np.array([r["first_token_s"][n] for r in runs])
        prefill.append({"tokens": int(n), "first_token": spread(first), "prefill": spread(int(n) / first)})
    for d in runs[0]["decode_s"]:
        decode.append({"depth": int(d), "decode": spread(generate / np.array([r["decode_s"][d] for r in runs]))})
    return {"prefill_curve": prefill, "decode_curve": decode}


def series(measured: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Every speed of `curves` by a name that tells its length where there are several."""
    found = []
    for what, key in (("prefill", "tokens"), ("decode", "depth")):
        points = measured[f"{what}_curve"]
        for p in points:
            where = "" if len(points) == 1 else f" of {p[key]} tokens" if key == "tokens" else f" at depth {p[key]}"
            found.append((f"{what}{where}", p[what]))
    return found


def is_tight(measured: dict[str, Any]) -> bool:
    """Whether more repetitions would say nothing new."""
    return all(half_width(s) <= TIGHT for _, s in series(measured))


def unstable(measured: dict[str, Any]) -> list[str]:
    """Why speeds should not be trusted: a median is known too badly, or they drift."""
    reasons = []
    for name, s in series(measured):
        if (width := half_width(s)) > TIGHT:
            reasons.append(f"{name} is known to ±{width:.1%} only")
        if abs(change := drift(s)) > DRIFT:
            reasons.append(f"{name} drifts by {change:+.0%} over the repetitions")
    return reasons
