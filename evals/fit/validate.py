"""Estimates held against what was measured: published points, each foretold by the others, and reports of `llmc bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmc.console import size
from llmc.evals.fit.estimate import Rates, estimate, left_out, memory
from llmc.evals.fit.run import Candidate, candidate, rates_for


def validate(reports: tuple[Path, ...], targets: Path | None = None, profiles: bool = True) -> list[dict[str, Any]]:
    """[{'target', 'point', 'what', 'measured', 'low', 'mid', 'high', 'error' (of mid, relative), 'inside'}].

    Of a report, every measured decoding, prefill and peak memory on targets of which rates are known; emulated ones say
    nothing. With `profiles`, the published points of every shipped profile.
    """
    from llmc.evals.report.store import speeds_of
    from llmc.runtimes.targets.profile import profile_ids, read_profile

    out = []
    candidates = [candidate(r) for r in reports]
    for target in dict.fromkeys(t for c in candidates if c.report for t in speeds_of(c.report)):
        rates = None
        for c in candidates:
            section = speeds_of(c.report or {}).get(target)
            if section is None or c.model is None or section["target"]["emulated"]:
                continue
            rates = rates or rates_for(target, candidates, targets)
            out += _of_section(c, target, section, rates)
    for id in profile_ids() if profiles else ():
        for p in left_out(read_profile(id)):
            out.append({"target": id, "point": p["point"], "what": "decode, published", "measured": p["measured"],
                        **p["decode"], "error": p["error"], "inside": p["inside"]})
    return out


def _of_section(c: Candidate, target: str, section: dict[str, Any], rates: Rates) -> list[dict[str, Any]]:
    assert c.model is not None
    generate = section["protocol"]["generate"]
    out = []
    for p in section["decode_curve"]:
        # the depth grows while tokens are decoded: the middle of them stands for all
        e = estimate(c.model, rates, depth=p["depth"] + generate // 2)["decode"]
        out.append(_point(c, target, f"decode at {p['depth']}", p["decode"]["median"], e))
    for p in section["prefill_curve"]:
        if e := estimate(c.model, rates, prompt=p["tokens"])["prefill"]:
            out.append(_point(c, target, f"prefill of {p['tokens']}", p["prefill"]["median"], e))
    context = max(p["tokens"] for p in section["prefill_curve"]) + generate
    ram = dict(zip(("low", "mid", "high"), memory(c.model, context), strict=True))
    out.append(_point(c, target, "peak memory", section["peak_rss"], ram))
    return out


def _point(c: Candidate, target: str, what: str, measured: float, e: dict[str, float]) -> dict[str, Any]:
    return {"target": target, "point": c.name, "what": what, "measured": measured, **e, "error": e["mid"] / measured - 1,
            "inside": e["low"] <= measured <= e["high"]}


def rows(points: list[dict[str, Any]]) -> list[list[str]]:
    """The table: what was measured, what is estimated, and how far off."""
    def show(p: dict[str, Any], v: float) -> str:
        return size(v) if p["what"] == "peak memory" else f"{v:.4g}"

    return [["target", "of", "what", "measured", "estimate", "low to high", "error", "inside"],
            *([p["target"], p["point"], p["what"], show(p, p["measured"]), show(p, p["mid"]),
               f"{show(p, p['low'])} to {show(p, p['high'])}", f"{p['error']:+.0%}", "yes" if p["inside"] else "NO"]
              for p in points)]
