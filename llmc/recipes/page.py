"""The HTML page and the Markdown of a recipe run: size, perplexity, KL divergence and speed after each step, and its time."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from llmc.console import duration, size
from llmc.evals.compare.matrix import matrix
from llmc.evals.compare.schema import Compared
from llmc.evals.compare.tables import gates_table
from llmc.evals.pages import charts, training
from llmc.evals.pages.figure import Figure
from llmc.evals.pages.measured import figures
from llmc.evals.pages.render import render
from llmc.evals.report.schema import Speed
from llmc.evals.report.sections import speeds_of, targets_of, texts_of
from llmc.evals.report.show import Table, change, filled, plain, pm, tables_markdown
from llmc.evals.report.show import markdown as as_markdown
from llmc.recipes.schema import RunArtifact, RunReport, StepReport


def page(report: RunReport, folder: Path) -> str:
    """The HTML page of a report (report.py). folder: the folder of the page, for links to the comparisons' pages."""
    recipe = report["recipe"]
    return render(
        "recipe.html.jinja", heading=recipe["name"], recipe=recipe, gates=report["gates"], links=_links(report, folder),
        tables=tables(report), figures=list(_pictures(report)),
        folded=[*((f"Provenance: {a['name']}", _facts(a)) for a in report["artifacts"]),
                ("Versions", report["versions"].items())],
    )


def markdown(report: RunReport) -> str:
    """The tables and the provenance of a report as Markdown."""
    parts = [f"# {report['recipe']['name']}", report["recipe"]["about"], tables_markdown(tables(report))]
    for a in report["artifacts"]:
        rows = [["", a["name"]], *([k, plain(v).replace("\n", " ")] for k, v in _facts(a))]
        parts.append(f"## Provenance: {a['name']}\n\n{as_markdown(rows)}")
    return "\n\n".join(p for p in parts if p) + "\n"


def tables(report: RunReport) -> list[Table]:
    """The tables of a report: artifacts (one table per text), steps, gates."""
    texts = dict.fromkeys(t["protocol"]["text"] for a in report["artifacts"] for t in texts_of(a.get("report")))
    found = [_artifacts(report["artifacts"], text) for text in texts] or [_artifacts(report["artifacts"], None)]
    found.append(_steps(report["steps"]))
    if report["gates"]:
        found.append(gates_table(report["gates"]))
    return found


def _artifacts(artifacts: list[RunArtifact], text: str | None) -> Table:
    """A row for each artifact, in the order of the chain."""
    targets = targets_of([a.get("report") for a in artifacts])
    rows = [["artifact", "made from", "weights", "of base", "perplexity", "to base", "KLD, nats", "top-1 %",
             *(what + (f" on {t}" if len(targets) > 1 else "") for t in targets
               for what in ("decode tok/s", "prefill tok/s", "peak memory"))]]
    base = artifacts[0]["bytes"]
    for a in artifacts:
        t = next((t for t in texts_of(a.get("report")) if t["protocol"]["text"] == text), None)
        speeds = speeds_of(a.get("report"))
        rows.append([
            a["name"], a["from"] or "–", "–" if a["bytes"] is None else size(a["bytes"]),
            "–" if a["bytes"] is None or not base else f"{a['bytes'] / base:.1%}",
            pm(t["perplexity"], 2) if t else "–", change(t["perplexity_ratio"]) if t and t["perplexity_ratio"] else "–",
            pm(t["kld"], 4) if t else "–", pm(t["top1"], 1, 100) if t else "–",
            *(cell for t in targets for cell in _speed(speeds.get(t))),
        ])
    how = f"measured on {text}" if text else "nothing was evaluated"
    return "What each step did", f"{how}; – is not measured; ? marks an unstable speed; ± is one standard error", filled(rows)


def _speed(speed: Speed | None) -> list[str]:
    """['41.2', '190.3', '210.0 MB'] for decode, prefill, peak memory; '41.2?' for an unstable or emulated run."""
    if speed is None:
        return ["–"] * 3
    doubt = "?" if speed["unstable"] or speed["target"]["emulated"] else ""
    return [*(f"{s['median']:.1f}{doubt}" for s in (speed["decode"], speed["prefill"])), size(speed["peak_rss"])]


def _steps(steps: list[StepReport]) -> Table:
    rows = [["step", "from", "options", "time"]]
    for s in steps:
        options = ", ".join(f"{k} {plain(v)}" for k, v in s["options"].items()) or "defaults"
        source = ", ".join(s["from"]) + (f" (teacher {s['teacher']})" if s["teacher"] else "")
        time = "–" if s["seconds"] is None else duration(s["seconds"]) + (" (resumed)" if s["resumed"] else "")
        rows.append([s["job"], source, options, time])
    total = sum(s["seconds"] or 0 for s in steps)
    note = "each step timed when it was run; a resumed step only from where it continued"
    return "Steps", f"{duration(total)} in all, {note}", rows


def _pictures(report: RunReport) -> Iterable[Figure]:
    """The figures of `llmc compare` for the measured artifacts, the training curves, and the time of each step."""
    shown: list[Compared] = [{"name": a["name"], "report": a["report"], "differences": None}
                             for a in report["artifacts"] if "report" in a]
    if shown:
        yield from figures(shown, matrix(shown))
    for command in training.TRAININGS:
        trained = [s for s in report["steps"] if "curve" in s and s["command"] == command]
        if trained:
            yield training.figure(command, [(i, s["job"], s["curve"]) for i, s in enumerate(trained, 1)])
    timed = [(s["job"], seconds) for s in report["steps"] if (seconds := s["seconds"])]
    if timed:
        rows = [charts.Bar(job, [seconds], duration(seconds)) for job, seconds in timed]
        yield Figure("Time", "Time of each step when it was run.", svg=charts.bars(rows, ["seconds"], "seconds"))


def _facts(artifact: RunArtifact) -> list[tuple[str, Any]]:
    """The provenance of an artifact: source, passes with their texts and hashes, versions."""
    facts: list[tuple[str, Any]] = [("path", artifact["path"]), ("kind", artifact["kind"])]
    if report := artifact.get("report"):
        facts.append(("sha256", report["artifact"]["sha256"]))
    if (provenance := artifact.get("provenance")) is None:
        return facts
    facts += [(f"source: {k}", v) for k, v in (provenance["source"] or {}).items()]
    for p in provenance["passes"]:
        facts += [(f"{p.get('name')}: {k}", v) for k, v in p.items() if k != "name"]
    if created := provenance.get("created"):
        facts.append(("created", created))
    return facts + [(f"version: {k}", v) for k, v in (provenance.get("versions") or {}).items()]


def _links(report: RunReport, folder: Path) -> list[tuple[str, str]]:
    """(job, relative address) of each comparison's page."""
    return [(c["job"], quote(Path(os.path.relpath(c["page"], folder)).as_posix())) for c in report["comparisons"]]
