"""The figures of the results of eval and bench. An empty figure shows the command that measures its data."""

from __future__ import annotations

from collections.abc import Iterable

from llmc.console import size
from llmc.evals.compare.schema import Cell, Compared
from llmc.evals.pages import charts, matrix
from llmc.evals.pages.figure import Figure, boxes, dots
from llmc.evals.report.sections import texts_of
from llmc.families.names import CLASSES


def figures(artifacts: list[Compared], cells: list[Cell]) -> Iterable[Figure]:
    """All figures. artifacts: in the order of their colours."""
    yield _divergence(artifacts)
    if not cells:
        yield Figure("Speed against divergence", "Down and right is better.",
                     how="llmc bench ARTIFACT -o REPORT (the report of llmc eval)")
    yield from matrix.figures(cells, [a["name"] for a in artifacts])
    yield _layers(artifacts)
    rows = []
    for a in artifacts:
        weight = a["report"]["artifact"]["size"]
        rows.append(charts.Bar(a["name"], [weight["classes"][k]["bytes"] / 1e6 for k in CLASSES],
                               size(weight["tensor_bytes"])))
    yield Figure("Bytes by class", "Size of the tensors by class.", boxes(CLASSES),
                 charts.bars(rows, CLASSES, "MB of tensors"))


def _divergence(artifacts: list[Compared]) -> Figure:
    """Size against KL divergence. It has a point for each artifact and text. All texts except the first are rings."""
    points, texts = [], []
    for i, a in enumerate(artifacts):
        megabytes = a["report"]["artifact"]["size"]["file_bytes"] / 1e6
        for n, t in enumerate(texts_of(a["report"])):
            if kld := t["kld"]:
                texts.append(t["protocol"]["text"])
                points.append(charts.Point(megabytes, kld["value"], a["name"], i, kld["se"], hollow=n > 0))
    first, *others = dict.fromkeys(texts) or [""]
    rings = f" Filled: {first}. Rings: {', '.join(others)}." if others else ""
    return Figure("Size against divergence", "Down and left is better." + rings,
                  dots(enumerate(a["name"] for a in artifacts)), charts.scatter(points, "file, MB", matrix.KLD),
                  "llmc eval ARTIFACT --base BASE -o REPORT")


def _layers(artifacts: list[Compared]) -> Figure:
    curves, names = [], []
    for i, a in enumerate(artifacts):
        layers = a["report"]["artifact"]["layers"]
        names += [(i, a["name"])] if layers else []
        if errors := [(n, 100 * e) for x in layers if (n := x["layer"]) is not None and (e := x["error"]) is not None]:
            curves.append(charts.Line(a["name"], i, errors))
    return Figure("Error by layer", "Lost share of each layer's output energy, as recorded by the last pass.",
                  dots(names), charts.lines(curves, "decoder layer", "output energy lost, %"),
                  "llmc quantize (the artifact's manifest records it)")
