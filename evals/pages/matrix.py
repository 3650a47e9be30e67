"""The matrix of artifacts and targets as figures. Each device has three: the Pareto front, latency and memory."""

from __future__ import annotations

from collections.abc import Iterable

from markupsafe import Markup

from llmc.console import size
from llmc.evals.compare.matrix import held
from llmc.evals.compare.schema import Cell
from llmc.evals.pages import charts
from llmc.evals.pages.figure import Figure, boxes, dots

KINDS = ("weights", "KV cache", "rest")
KLD = "KL divergence to the base, nats"


def figures(cells: list[Cell], names: list[str]) -> Iterable[Figure]:
    """The figures of every device. names: artifacts of the page, in the order of their colours."""
    for target in dict.fromkeys(c["target"] for c in cells):
        shown = [c for c in cells if c["target"] == target]
        sources = " ".join(dict.fromkeys(_source(c) for c in shown))
        rings = " Rings: further texts." if any(len(c["texts"]) > 1 for c in shown) else ""
        rings += " Broken outline: the speed is unstable." if any(c["unstable"] for c in shown) else ""
        if any(c["source"] != "emulated" for c in shown):
            key = dots((names.index(c["artifact"]), c["artifact"]) for c in shown)
            yield Figure(f"Speed on {target} against divergence",
                         f"Down and right is better. The line is the Pareto front.{rings} {sources}", key,
                         _front(shown, names),
                         "llmc eval ARTIFACT --base BASE and llmc bench ARTIFACT --target T, with the same -o REPORT")
            yield Figure(f"Time to the first token on {target}", f"By the length of the prompt. {sources}", key,
                         _latency(shown, names),
                         f"llmc bench ARTIFACT --target {target} --prompt 128,512,2048")
        yield Figure(f"Memory on {target}", f"Measured memory is the peak. {sources}", boxes(KINDS), _memory(shown))


def _front(cells: list[Cell], names: list[str]) -> Markup:
    """The scatter chart with the Pareto front of measured values, or of estimates if nothing was measured."""
    shown = [(c, kld) for c in cells if (kld := c["kld"]) and c["source"] != "emulated"]
    source = "measured" if any(c["source"] == "measured" for c, _ in shown) else "estimate"
    front = sorted((c["decode"]["mid"], kld["value"]) for c, kld in shown if c["front"] and c["source"] == source)
    return charts.scatter([p for c, _ in shown for p in _points(c, names)], "decode, tokens/s", KLD, front)


def _latency(cells: list[Cell], names: list[str]) -> Markup:
    curves = [charts.Line(c["artifact"], names.index(c["artifact"]),
                          [(p["tokens"], p["mid"]) for p in c["first_token"]], dashed=c["source"] != "measured")
              for c in cells if c["first_token"]]
    return charts.lines(curves, "prompt, tokens", "first token, s")


def _memory(cells: list[Cell]) -> Markup:
    rows = []
    for c in cells:
        m = c["memory"]
        rows.append(charts.Bar(c["artifact"], [n / 1e6 for n in (m["weights"], m["kv"], m["rest"])],
                               "~" * (c["source"] == "estimate") + size(held(c))))
    return charts.bars(rows, KINDS, "MB")


def _source(c: Cell) -> str:
    """A sentence about the source of a cell's values."""
    if c["source"] == "emulated":
        return "Emulated: its speed says nothing of the device."
    return f"Broken lines: estimate, {c['basis']}." if c["source"] == "estimate" else f"Measured ({c['basis']})."


def _points(c: Cell, names: list[str]) -> Iterable[charts.Point]:
    """A point for each text. All texts except the first are rings."""
    d = c["decode"]
    guess = c["source"] == "estimate"
    for n, kld in enumerate(c["texts"]):
        yield charts.Point(d["mid"], kld["value"], c["artifact"], names.index(c["artifact"]), kld["se"],
                           hollow=n > 0, doubtful=c["unstable"], guess=guess, span=(d["low"], d["high"]) if guess else None)
