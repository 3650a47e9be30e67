"""The page of `llmc compare`: charts, tables, protocols and origin of the artifacts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmc.console import size
from llmc.evals.compare.schema import Compared, Comparison
from llmc.evals.compare.tables import tables
from llmc.evals.pages import training
from llmc.evals.pages.figure import Figure
from llmc.evals.pages.measured import figures
from llmc.evals.pages.render import render
from llmc.evals.pages.svg import colour
from llmc.evals.report.schema import Report
from llmc.evals.report.sections import budget_of, quality_of, speeds_of, targets_of, tasks_of, texts_of
from llmc.evals.report.show import pm
from llmc.files import staged_file

Facts = Iterable[tuple[str, Any]]


def write_page(comparison: Comparison, path: Path) -> None:
    """Write the HTML page of a comparison to `path`."""
    with staged_file(path) as tmp:
        tmp.write_text(page(comparison), encoding="utf-8")


def page(comparison: Comparison) -> str:
    """The HTML page of a comparison."""
    artifacts = comparison["artifacts"]
    names = [a["name"] for a in artifacts]
    return render(
        "compare.html.jinja", heading=" against ".join([", ".join(names[1:]), names[0]]) if len(names) > 1 else names[0],
        gates=comparison["gates"], cards=[_card(a, i) for i, a in enumerate(artifacts)],
        figures=[*figures(artifacts, comparison["matrix"]), *_trainings(artifacts)], tables=tables(comparison),
        folded=[*_protocols(artifacts), *((f"Provenance: {a['name']}", _provenance(a["report"])) for a in artifacts)],
    )


def _card(artifact: Compared, index: int) -> dict[str, Any]:
    """The card of one artifact with its main results."""
    report, changes = artifact["report"], artifact["differences"]
    weight = report["artifact"]["size"]
    ratio = f" ({changes['size_ratio']:.0%})" if changes else ""
    facts = [("file", f"{size(weight['file_bytes'])}{ratio}"), ("a token reads", size(weight["token_bytes"])),
             ("bits per weight", f"{weight['bits_per_weight']:.2f}")]
    for i, t in enumerate(texts_of(report)):
        paired = changes["texts"][i] if changes and changes["texts"] else None
        ppl = pm(t["perplexity"], 2) + (f" ({paired['perplexity_ratio']['value'] - 1:+.1%})" if paired else "")
        facts.append((f"perplexity, {t['protocol']['text']}", ppl))
        if t["kld"]:
            note = f" (predicted {budget['predicted_kld']:.4f})" if (budget := budget_of(report)) else ""
            facts.append((f"KLD, {t['protocol']['text']}", pm(t["kld"], 4) + note))
            facts.append((f"top-1, {t['protocol']['text']}", f"{pm(t['top1'], 1, 100)} %"))
    for target, s in speeds_of(report).items():
        speedup = changes["speeds"].get(target) if changes and changes["speeds"] else None
        times = f" ({speedup['decode_speedup']['value']:.2f}x)" if speedup else ""
        doubt = "; emulated" if s["target"]["emulated"] else "".join(f"; UNSTABLE: {why}" for why in s["unstable"])
        facts.append((f"decode, {target}", f"{s['decode']['median']:.1f} tokens/s{times}{doubt}"))
        facts.append((f"peak memory, {target}", size(s["peak_rss"])))
    role = "baseline" if artifact["differences"] is None else "candidate"
    return {"name": artifact["name"], "role": role, "colour": colour(index), "facts": facts}


def _trainings(artifacts: list[Compared]) -> Iterable[Figure]:
    """A chart for each kind of training that an artifact has."""
    for kind in training.TRAININGS:
        curves = [(i, a["name"], _curve(a["report"], kind)) for i, a in enumerate(artifacts)]
        if trained := [c for c in curves if c[2]]:
            yield training.figure(kind, trained)


def _curve(report: Report, kind: str) -> dict[str, Any]:
    """The last pass with the name `kind` and a curve; empty if there is none."""
    found: list[dict[str, Any]] = [p for p in report["artifact"]["passes"] if p.get("name") == kind and p.get("curve")]
    return found[-1] if found else {}


def _protocols(artifacts: list[Compared]) -> Iterable[tuple[str, Facts]]:
    """The protocols. Each is shown once, because compare checks that they are equal for all artifacts."""
    for text in texts_of(next((a["report"] for a in artifacts if quality_of(a["report"])), None)):
        yield f"Protocol: {text['protocol']['text']}", text["protocol"].items()
    seen = {name: t for a in reversed(artifacts) for name, t in tasks_of(a["report"]).items()}
    for name, t in seen.items():
        yield f"Protocol: {name}", [*t["protocol"].items(), ("items from", t["source"])]
    for target in targets_of([a["report"] for a in artifacts]):
        s = next(speeds_of(a["report"])[target] for a in artifacts if target in speeds_of(a["report"]))
        facts: dict[str, object] = {"address": s["target"]["address"], **s["target"]["facts"]}
        facts |= {"memory": size(s["target"]["facts"]["memory"])} if "memory" in facts else {}
        yield f"Protocol: speed on {target}", (dict(s["protocol"]) | facts).items()


def _provenance(report: Report) -> Facts:
    """The origin of one artifact, and the runtimes that ran it."""
    a = report["artifact"]
    facts: list[tuple[str, Any]] = [("path", a["path"]), ("sha256", a["sha256"]), ("kind", a["kind"])]
    facts += [(f"source: {k}", v) for k, v in (a.get("source") or {}).items()]
    for p in a["passes"]:
        facts += [(f"{p.get('name')}: {k}", v) for k, v in p.items() if k not in ("name", "curve", "losses")]
    facts += [("event", f"layer {x['layer']}: {event}") for x in a["layers"] for event in x["events"]]
    if quality := quality_of(report):
        facts += [(f"run by (quality), {k}", v) for k, v in quality["runtime"].items()]
    for t, s in speeds_of(report).items():
        facts += [(f"run by (speed, {t}), {k}", v) for k, v in s["runtime"].items()]
        facts += [(f"unstable (speed, {t})", why) for why in s["unstable"]]
    return facts + [(f"version: {k}", v) for k, v in report["versions"].items()]
