"""Statistics of repetitions: median, interquartile range, and the reasons why a result is unstable."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmc.evals.report.schema import Conditions, Curves, DecodePoint, Energy, PrefillPoint, Spread

TIGHT = 0.015
"""Largest half-width of a median's confidence interval, as a share of the median, at which no more repetitions are run. Two
such medians of the same quantity differ by less than 3 %."""
SLOWED = 0.9  # a CPU was throttled if its frequency fell below this share of its early frequency
DRIFT = 0.05  # largest `drift` of a stable speed


def spread(values: np.ndarray) -> Spread:
    """Median and interquartile range of `values` [repetitions]."""
    low, median, high = (float(x) for x in np.percentile(values, (25, 50, 75)))
    return {"median": median, "iqr": high - low, "values": [float(v) for v in values]}


def half_width(s: Spread) -> float:
    """Half-width of the median's 95 % confidence interval, as a share of the median.

    It is the notch of McGill, Tukey and Larsen (1978), 1.57 IQR / sqrt(n), wider for few repetitions, about as Student's t.
    The intervals of two medians of the same quantity overlap in 95 of 100 cases.
    """
    n = len(s["values"])
    return float(1.57 * (1 + 1.6 / (n - 1)) * s["iqr"] / np.sqrt(n) / s["median"])


def drift(s: Spread) -> float:
    """Change from the first to the last repetition along a least-squares line, as a share of the median."""
    n = len(s["values"])
    return float(np.polyfit(np.arange(n), s["values"], 1)[0]) * (n - 1) / float(s["median"])


def curves(runs: list[dict[str, Any]], generate: int) -> Curves:
    """Speed by length. runs: answers of runtimes/on_device/bench.py. generate: decoded tokens."""
    prefill: list[PrefillPoint] = []
    decode: list[DecodePoint] = []
    for n in runs[0]["first_token_s"]:
        first = np.array([r["first_token_s"][n] for r in runs])
        prefill.append({"tokens": int(n), "first_token": spread(first), "prefill": spread(int(n) / first)})
    for d in runs[0]["decode_s"]:
        decode.append({"depth": int(d), "decode": spread(generate / np.array([r["decode_s"][d] for r in runs]))})
    return {"prefill_curve": prefill, "decode_curve": decode}


def series(measured: Curves) -> list[tuple[str, Spread]]:
    """Every speed of `curves` with a name. The name includes the length if there are several."""
    prefill, decode = measured["prefill_curve"], measured["decode_curve"]
    return [*(("prefill" + (f" of {p['tokens']} tokens" if len(prefill) > 1 else ""), p["prefill"]) for p in prefill),
            *(("decode" + (f" at depth {d['depth']}" if len(decode) > 1 else ""), d["decode"]) for d in decode)]


def is_tight(measured: Curves) -> bool:
    """Whether all medians are known well enough, so that no more repetitions are needed."""
    return all(half_width(s) <= TIGHT for _, s in series(measured))


def unstable(measured: Curves) -> list[str]:
    """The reasons why speeds are unstable: the median is too uncertain, or the speed drifts."""
    reasons = []
    for name, s in series(measured):
        width, change = half_width(s), drift(s)
        why = [f"is known to ±{width:.1%} only"] if width > TIGHT else []
        why += [f"drifts by {change:+.0%} over the repetitions"] if abs(change) > DRIFT else []
        if why:
            reasons.append(f"{name} {' and '.join(why)}")
    return reasons


def throttled(runs: list[dict[str, Any]]) -> list[str]:
    """The reasons why the machine was not at full speed: throttle events, throttling reported by the firmware, or a lower
    CPU frequency."""
    states = [r["state"] for r in runs]
    reasons = []
    counts = [s["throttle_events"] for s in states if s["throttle_events"] is not None]
    if counts and counts[-1] > counts[0]:
        reasons.append(f"the hardware throttled the CPU {counts[-1] - counts[0]} times")
    if any(s["throttled_now"] for s in states):
        reasons.append("the firmware reports that the CPU is throttled (heat or power)")
    mhz = [s["mhz"] for s in states if s["mhz"] is not None]
    third = len(mhz) // 3
    if third and (late := float(np.median(mhz[-third:]))) < SLOWED * (early := float(np.median(mhz[:third]))):
        reasons.append(f"the CPU's frequency fell from {early:.0f} to {late:.0f} MHz")
    return reasons


def conditions(runs: list[dict[str, Any]]) -> Conditions:
    """Frequency and temperature after the first and after the last repetition."""
    first, last = runs[0]["state"], runs[-1]["state"]
    return {"mhz": [first["mhz"], last["mhz"]], "temperature_c": [first["temperature_c"], last["temperature_c"]]}


def energy(runs: list[dict[str, Any]], generate: int) -> Energy | None:
    """Energy of decoding; None if the machine has no energy counter."""
    joules = [r["joules"] for r in runs if r["joules"] is not None]
    if not joules:
        return None
    return {"joules_per_token": float(np.median(joules)) / generate, "source": runs[0]["energy_source"]}
