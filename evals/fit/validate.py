"""Compare estimates with measurements: those of `llmc bench`, and published points, each estimated from the others."""

from __future__ import annotations

from pathlib import Path

from llmc.console import size
from llmc.evals.fit.estimate import Rates, bounds, estimate, left_out, memory
from llmc.evals.fit.run import Candidate, candidate, rates_for
from llmc.evals.fit.schema import Bounds, Point
from llmc.evals.report.schema import Speed
from llmc.evals.report.sections import speed_on, speeds_of


def validate(reports: tuple[Path, ...], targets: Path | None = None, profiles: bool = True) -> list[Point]:
    """Return every estimate for which there is a measurement.

    From a report: every decode speed, prefill speed and peak memory on each target that is not emulated. With `profiles`: the
    published points of every profile in llmc.
    """
    from llmc.runtimes.targets.profile import profile_ids, read_profile

    out: list[Point] = []
    candidates = [candidate(r) for r in reports]
    for target in dict.fromkeys(t for c in candidates for t in speeds_of(c.report)):
        rates = None
        for c in candidates:
            section = speed_on(c.report, target)
            if section is None or c.model is None:
                continue
            rates = rates or rates_for(target, candidates, targets)
            out += _of_section(c, target, section, rates)
    for id in profile_ids() if profiles else ():
        for p in left_out(read_profile(id)):
            out.append({"target": id, "point": p["point"], "what": "decode, published", "measured": p["measured"],
                        **p["decode"], "error": p["error"], "inside": p["inside"]})
    return out


def _of_section(c: Candidate, target: str, section: Speed, rates: Rates) -> list[Point]:
    assert c.model is not None
    generate = section["protocol"]["generate"]
    out: list[Point] = []
    for p in section["decode_curve"]:
        # the depth grows while tokens are decoded, so the estimate is for the middle of them
        e = estimate(c.model, rates, depth=p["depth"] + generate // 2)["decode"]
        out.append(_point(c, target, f"decode at {p['depth']}", p["decode"]["median"], e))
    for f in section["prefill_curve"]:
        if fill := estimate(c.model, rates, prompt=f["tokens"])["prefill"]:
            out.append(_point(c, target, f"prefill of {f['tokens']}", f["prefill"]["median"], fill))
    context = max(p["tokens"] for p in section["prefill_curve"]) + generate
    out.append(_point(c, target, "peak memory", section["peak_rss"], bounds(*memory(c.model, context))))
    return out


def _point(c: Candidate, target: str, what: str, measured: float, e: Bounds) -> Point:
    return {"target": target, "point": c.name, "what": what, "measured": measured, **e, "error": e["mid"] / measured - 1,
            "inside": e["low"] <= measured <= e["high"]}


def rows(points: list[Point]) -> list[list[str]]:
    """A table of points: the measurement, the estimate with its interval, and the error."""
    def show(p: Point, v: float) -> str:
        return size(v) if p["what"] == "peak memory" else f"{v:.4g}"

    return [["target", "of", "what", "measured", "estimate", "low to high", "error", "inside"],
            *([p["target"], p["point"], p["what"], show(p, p["measured"]), show(p, p["mid"]),
               f"{show(p, p['low'])} to {show(p, p['high'])}", f"{p['error']:+.0%}", "yes" if p["inside"] else "NO"]
              for p in points)]
