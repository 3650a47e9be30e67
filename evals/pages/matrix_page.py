"""The matrix of artifacts and targets as a table and as pictures: a Pareto front a device, latency, memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llmc.console import size
from llmc.evals.pages import charts, html
from llmc.evals.pages.html import COLOURS
from llmc.evals.report.show import filled

Table = tuple[str, str, list[list[str]]]
KINDS = ("weights", "KV cache", "the rest")
KLD = "KL divergence to the base, nats"


def tables(cells: list[dict[str, Any]]) -> list[Table]:
    """Decode speed, first token and memory by artifact and device; nothing where one device's own table says it all."""
    if all((c["target"], c["source"]) == (cells[0]["target"], "measured") for c in cells):
        return []
    targets, artifacts = (list(dict.fromkeys(c[k] for c in cells)) for k in ("target", "artifact"))
    by = {(c["artifact"], c["target"]): c for c in cells}
    rows = [["artifact", *(f"{t}{what}" for t in targets for what in (": decode tok/s", ": first token s", ": memory"))]]
    for a in artifacts:
        rows.append([a, *(text for t in targets for text in _cell(by.get((a, t))))])
    notes = ["★: no other is as fast and as near the base there"]
    notes += ["~: an estimate, low to high"] if any(c["source"] == "estimate" for c in cells) else []
    notes += ["emulated: says nothing of the device, never compared"] if any(c["source"] == "emulated" for c in cells) else []
    return [("Devices", "; ".join(notes), filled(rows))]


def _cell(c: dict[str, Any] | None) -> list[str]:
    if c is None:
        return ["–"] * 3
    ram = size(sum(c["memory"].values()))
    first = min(c["first_token"], key=lambda p: abs(p["tokens"] - 512), default=None)
    if c["source"] == "estimate":
        said = "–" if first is None else f"~{first['mid']:.3g} ({first['tokens']} tokens)"
        low, mid, high = (f"{c['decode'][k]:.3g}" for k in ("low", "mid", "high"))
        return [f"~{mid} ({low} to {high}){_star(c)}", said, f"~{ram}"]
    mark = " emulated" if c["source"] == "emulated" else " UNSTABLE" if c["unstable"] else ""
    said = "–" if first is None else f"{first['mid']:.3g} ({first['tokens']} tokens){mark}"
    return [f"{c['decode']['mid']:.1f}{mark}{_star(c)}", said, ram]


def _star(c: dict[str, Any]) -> str:
    return " ★" if c["front"] else ""


def figures(cells: list[dict[str, Any]], names: list[str]) -> Iterable[str]:
    """For every device its front, its latency and its memory. names: the page's artifacts, in the order of their colours."""
    for target in dict.fromkeys(c["target"] for c in cells):
        mine = [c for c in cells if c["target"] == target]
        how = " ".join(dict.fromkeys(_said(c) for c in mine))
        rings = " Rings: further texts." if any(len(c["texts"]) > 1 for c in mine) else ""
        rings += " Broken outline: the repetitions of its bench disagree." if any(c["unstable"] for c in mine) else ""
        key = html.legend((names.index(c["artifact"]), c["artifact"]) for c in mine)
        if any(c["source"] != "emulated" for c in mine):
            yield html.figure(f"Speed on {target} against divergence",
                              f"Down and right is better; the line is the front.{rings} {how}", key, _front(mine, names),
                              "llmc eval ARTIFACT --base BASE and llmc bench ARTIFACT --target T, into one report")
            yield html.figure(f"Time to the first token on {target}", f"By the prompt's length. {how}", key,
                              _latency(mine, names), f"llmc bench ARTIFACT --target {target} --prompt 128,512,2048")
        kinds = "".join(f'<span><i class="box" style="background:var(--k{i})"></i>{k}</span>' for i, k in enumerate(KINDS))
        yield html.figure(f"Memory on {target}", f"At its peak where it was measured. {how}",
                          f'<p class="legend">{kinds}</p>', _memory(mine), "")


def _front(cells: list[dict[str, Any]], names: list[str]) -> str:
    """Empty where no divergence was measured. A line joins what is best, of measured figures where there are some."""
    shown = [c for c in cells if c["kld"] and c["source"] != "emulated"]
    if not shown:
        return ""
    source = "measured" if any(c["source"] == "measured" for c in shown) else "estimate"
    front = sorted((c["decode"]["mid"], c["kld"]["value"]) for c in shown if c["front"] and c["source"] == source)
    return charts.scatter([p for c in shown for p in _points(c, names)], "decode, tokens/s", KLD, front)


def _latency(cells: list[dict[str, Any]], names: list[str]) -> str:
    curves = [charts.Line(c["artifact"], names.index(c["artifact"]) % COLOURS,
                          [(p["tokens"], p["mid"]) for p in c["first_token"]], dashed=c["source"] != "measured")
              for c in cells if c["first_token"]]
    return charts.lines(curves, "prompt, tokens", "first token, s") if curves else ""


def _memory(cells: list[dict[str, Any]]) -> str:
    return charts.bars([charts.Bar(c["artifact"], [c["memory"][k] / 1e6 for k in ("weights", "kv", "rest")],
                                   "~" * (c["source"] == "estimate") + size(sum(c["memory"].values()))) for c in cells],
                       KINDS, "MB")


def _said(c: dict[str, Any]) -> str:
    if c["source"] == "emulated":
        return "Emulated: its speed says nothing of the device."
    return f"Broken lines: estimate, {c['basis']}." if c["source"] == "estimate" else f"Measured ({c['basis']})."


def _points(c: dict[str, Any], names: list[str]) -> Iterable[charts.Point]:
    """One for each text, the second and further ones as rings."""
    d = c["decode"]
    guess = c["source"] == "estimate"
    for n, kld in enumerate(c["texts"]):
        yield charts.Point(d["mid"], kld["value"], c["artifact"], names.index(c["artifact"]) % COLOURS, kld["se"],
                           hollow=n > 0, doubtful=c["unstable"], guess=guess, span=(d["low"], d["high"]) if guess else None)
