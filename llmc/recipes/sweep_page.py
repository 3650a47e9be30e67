"""The page of a sweep: the files by size, KL divergence and speed, the Pareto front, and the variants."""

from __future__ import annotations

from llmc.console import duration, size
from llmc.evals.compare import gates
from llmc.evals.pages import charts
from llmc.evals.pages.figure import Figure, dots
from llmc.evals.pages.matrix import KLD
from llmc.evals.pages.render import render
from llmc.evals.report.schema import Kld
from llmc.evals.report.show import Table, filled, pm, tables_markdown
from llmc.recipes.schema import Point, SweepReport

FRONT, BEHIND = 1, 0  # colours


def page(result: SweepReport) -> str:
    """The HTML page."""
    return render("sweep.html.jinja", heading=result["recipe"],
                  gates=[g for v in result["variants"] for g in v.get("gates", [])],
                  figures=_pictures(result["artifacts"]), tables=tables(result),
                  folded=[("Versions", result["versions"].items())])


def markdown(result: SweepReport) -> str:
    """The tables as Markdown."""
    return f"# {result['recipe']}: sweep\n\n{tables_markdown(tables(result))}\n"


def tables(result: SweepReport) -> list[Table]:
    """The files, smallest first, and the variants."""
    rows = [["file", "variant", "front", "size", "perplexity", "KLD, nats", "decode tok/s"]]
    for a in sorted(result["artifacts"], key=lambda a: a["bytes"] or 0):
        speed = "–" if a["decode"] is None else f"{a['decode']:.1f}" + ("?" if a["unstable"] else "")
        rows.append([a["name"], a["variant"], "★" if a["front"] else "", "–" if a["bytes"] is None else size(a["bytes"]),
                     pm(a["perplexity"], 2), pm(a["kld"], 4), speed])
    text = next((a["text"] for a in result["artifacts"] if a["text"]), None)
    found = [("Pareto front", f"★: no other file is at least as good in size, divergence (on {text}) and speed, and better "
              "in one; ? marks an unstable speed", filled(rows))]
    variants = [["variant", "gates", "time of its steps", "failed"]]
    for v in result["variants"]:
        missed = [f"{gates.verdict(g)}: {gates.describe(g)}" for g in v.get("gates", []) if not g["passed"]]
        verdict = "; ".join(missed) or ("passed" if v.get("gates") else "–")
        took = duration(v["seconds"]) if "seconds" in v else "–"
        variants.append([v["variant"], verdict, took, "; ".join(v["failed"]) or "–"])
    found.append(("Variants", "steps that several variants share were run once and count in each", filled(variants)))
    return found


def _pictures(artifacts: list[Point]) -> list[Figure]:
    """Size and speed against divergence. Points on the front have a colour of their own."""
    drawn = [(a, kld, n / 1e6) for a in artifacts if (kld := a["kld"]) and (n := a["bytes"])]
    key = dots([(FRONT, "on the front"), (BEHIND, "beaten by another")])
    by_size = [_mark(a, kld, megabytes) for a, kld, megabytes in drawn]
    by_speed = [_mark(a, kld, decode) for a, kld, _ in drawn if (decode := a["decode"])]
    return [
        Figure("Size against divergence", "Down and left is better.", key, charts.scatter(by_size, "file, MB", KLD),
               "a step `eval` in the recipe"),
        Figure("Speed against divergence", "Down and right is better.", key,
               charts.scatter(by_speed, "decode, tokens/s", KLD), "a step `bench` in the recipe"),
    ]


def _mark(artifact: Point, kld: Kld, x: float) -> charts.Point:
    name = artifact["name"] if artifact["variant"] == "every variant" else f"{artifact['variant']} {artifact['name']}"
    return charts.Point(x, kld["value"], name, FRONT if artifact["front"] else BEHIND, kld["se"])
