"""The page of `llmc compare`: one HTML file that needs nothing else, with pictures, tables, protocol and provenance.

Whatever comes from a report is escaped: names and texts are other people's.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

from llmc.console import size
from llmc.evals.compare.run import tasks_of
from llmc.evals.pages import charts, html, matrix_page
from llmc.evals.pages.html import COLOURS
from llmc.evals.report.show import pm
from llmc.evals.report.store import budget_of, speeds_of, targets_of
from llmc.evals.report.tables import tables
from llmc.families.names import CLASSES

# passes that record a curve: title, caption, the figure of a check, label of its axis
TRAININGS = {"distill": ("Distillation", "The loss that was trained", "loss", "loss, nats"),
             "heal": ("Healing", "Divergence from the teacher", "kld", "KL divergence, nats")}
MEASURES = {
    "perplexity": "exp of the mean negative log likelihood: how surprised the model is by the text; lower is better.",
    "KL divergence (KLD)": "how far the next-token distribution moved from the base model's, in nats; 0 is identical.",
    "top-1 agreement": "how often the likeliest next token is the same as the base model's.",
    "±": "one standard error from the spread of the chunks' means; differences are paired token by token.",
}


def page(comparison: dict[str, Any]) -> str:
    """The whole HTML of a result of `compare`."""
    artifacts = comparison["artifacts"]
    names = [a["name"] for a in artifacts]
    title = " against ".join([", ".join(names[1:]), names[0]]) if len(names) > 1 else names[0]
    body = [
        f'<header><p class="kicker">llmc compare</p><h1>{escape(title)}</h1>{html.verdict(comparison["gates"])}</header>',
        f'<div class="cards">{"".join(_summary(a, i) for i, a in enumerate(artifacts))}</div>',
        f'<div class="charts">{"".join([*figures(artifacts, comparison["matrix"]), *trainings(artifacts)])}</div>',
        *(html.table(*t) for t in tables(comparison)),
        html.section("What the figures are", html.pairs(MEASURES.items())),
        *_protocols(artifacts), *(provenance(a) for a in artifacts),
    ]
    return html.document(title, body)


def _summary(artifact: dict[str, Any], index: int) -> str:
    """The card of one artifact: the figures that decide."""
    report, changes = artifact["report"], artifact["differences"] or {}
    weight = report["artifact"]["size"]
    ratio = f" ({changes['size_ratio']:.0%})" if changes else ""
    facts = [("file", f"{size(weight['file_bytes'])}{ratio}"), ("bits per weight", f"{weight['bits_per_weight']:.2f}")]
    for i, t in enumerate(report.get("quality", {}).get("texts", [])):
        paired = changes["texts"][i] if changes.get("texts") else None
        ppl = pm(t["perplexity"], 2) + (f" ({paired['perplexity_ratio']['value'] - 1:+.1%})" if paired else "")
        facts.append((f"perplexity, {t['protocol']['text']}", ppl))
        if t["kld"]:
            note = f" (predicted {budget['predicted_kld']:.4f})" if (budget := budget_of(report)) else ""
            facts.append((f"KLD, {t['protocol']['text']}", pm(t["kld"], 4) + note))
            facts.append((f"top-1, {t['protocol']['text']}", f"{pm(t['top1'], 1, 100)} %"))
    for target, s in speeds_of(report).items():
        speedup = (changes.get("speeds") or {}).get(target)
        times = f" ({speedup['decode_speedup']['value']:.2f}x)" if speedup else ""
        doubt = "; emulated" if s["target"]["emulated"] else "".join(f"; UNSTABLE: {why}" for why in s["unstable"])
        facts.append((f"decode, {target}", f"{s['decode']['median']:.1f} tokens/s{times}{doubt}"))
        facts.append((f"peak memory, {target}", size(s["peak_rss"])))
    role = "baseline" if artifact["differences"] is None else "candidate"
    return (f'<section class="card"><p class="kicker"><i class="dot" style="background:var(--c{index % COLOURS})"></i>'
            f"{role}</p><h2>{escape(artifact['name'])}</h2>{html.pairs(facts)}</section>")


def figures(artifacts: list[dict[str, Any]], cells: list[dict[str, Any]]) -> Iterable[str]:
    """The pictures; one that has nothing to show says which command fills it."""
    by_size, layers = [], []
    texts: list[str] = []
    for i, a in enumerate(artifacts):
        report, colour = a["report"], i % COLOURS
        for n, t in enumerate(report.get("quality", {}).get("texts", [])):
            if t["kld"] is None:
                continue
            texts = texts if t["protocol"]["text"] in texts else [*texts, t["protocol"]["text"]]
            y = (t["kld"]["value"], a["name"], colour, t["kld"]["se"], n > 0)
            by_size.append(charts.Point(report["artifact"]["size"]["file_bytes"] / 1e6, *y))
        errors = [(x["layer"], 100 * x["error"]) for x in report["artifact"]["layers"] if x["error"] is not None]
        if errors:
            layers.append(charts.Line(a["name"], colour, errors))
    rings = f" Filled: {texts[0]}. Rings: {', '.join(texts[1:])}." if len(texts) > 1 else ""
    kld = "KL divergence to the base, nats"
    yield html.figure("Size against divergence", "Down and left is better." + rings, _legend(artifacts),
                  charts.scatter(by_size, "file, MB", kld) if by_size else "",
                  "llmc eval ARTIFACT --base BASE -o REPORT")
    if not cells:
        yield html.figure("Speed against divergence", "Down and right is better.", "", "",
                          "llmc bench ARTIFACT -o REPORT (into the report of llmc eval)")
    yield from matrix_page.figures(cells, [a["name"] for a in artifacts])
    yield html.figure("Error by layer", "Share of each layer's output energy that was lost, as the pass recorded it.",
                  _legend([a for a in artifacts if a["report"]["artifact"]["layers"]], artifacts),
                  charts.lines(layers, "decoder layer", "output energy lost, %") if layers else "",
                  "llmc quantize (the manifest beside the artifact records it)")
    yield html.figure("Bytes by class", "Where the file's bytes are.", _kinds(), _bytes(artifacts), "")


def trainings(artifacts: list[dict[str, Any]]) -> Iterable[str]:
    """The curves of what was trained, a picture for each kind of training that there was."""
    for name, (title, caption, by, label) in TRAININGS.items():
        if trained := [a for a in artifacts if _training(a, name)]:
            yield html.figure(title, f"{caption} on held-out text (dots; a ring around the step that was kept), and on each "
                          "step's batch (thin).", _legend(trained, artifacts),
                          charts.lines(_curves(artifacts, name, by), "step", label), "")


def _training(artifact: dict[str, Any], name: str) -> dict[str, Any]:
    """The last pass of that name with a curve; empty where there was none."""
    found: list[dict[str, Any]] = [p for p in artifact["report"]["artifact"]["passes"] if p.get("name") == name
                                   and p.get("curve")]
    return found[-1] if found else {}


def _curves(artifacts: list[dict[str, Any]], name: str, by: str) -> list[charts.Line]:
    """The loss of each step, and over it the held-out text's, for each that was trained by that pass."""
    drawn = []
    for i, a in enumerate(artifacts):
        training, colour = _training(a, name), i % COLOURS
        if losses := training.get("losses"):
            points = list(enumerate(losses, 1))
            drawn.append(charts.Line(f"{a['name']}, batch", colour, points, thin=True))
        if training:
            checks = [(row["step"], row[by]) for row in training["curve"]]
            drawn.append(charts.Line(f"{a['name']}, held-out", colour, checks, ring=training["best_step"]))
    return drawn


def _bytes(artifacts: list[dict[str, Any]]) -> str:
    rows = []
    for a in artifacts:
        weight = a["report"]["artifact"]["size"]
        rows.append(charts.Bar(a["name"], [weight["classes"][k]["bytes"] / 1e6 for k in CLASSES],
                               size(weight["tensor_bytes"])))
    return charts.bars(rows, CLASSES, "MB of tensors")


def _legend(shown: list[dict[str, Any]], every: list[dict[str, Any]] | None = None) -> str:
    order = [a["name"] for a in every or shown]
    return html.legend((order.index(a["name"]), a["name"]) for a in shown)


def _kinds() -> str:
    items = (f'<span><i class="box" style="background:var(--k{i})"></i>{kind}</span>' for i, kind in enumerate(CLASSES))
    return f'<p class="legend">{"".join(items)}</p>'


def _protocols(artifacts: list[dict[str, Any]]) -> Iterable[str]:
    """How it was measured: equal for all (compare has made sure), so shown once."""
    evaluated = next((a["report"] for a in artifacts if "quality" in a["report"]), None)
    for t in evaluated["quality"]["texts"] if evaluated else []:
        yield html.section(f"Protocol: {t['protocol']['text']}", html.pairs(t["protocol"].items()), folded=True)
    seen = {name: t for a in reversed(artifacts) for name, t in tasks_of(a["report"]).items()}
    for name, t in seen.items():
        yield html.section(f"Protocol: {name}", html.pairs({**t["protocol"], "items from": t["source"]}.items()), folded=True)
    for target in targets_of([a["report"] for a in artifacts]):
        s = next(speeds_of(a["report"])[target] for a in artifacts if target in speeds_of(a["report"]))
        facts = {"address": s["target"]["address"], **s["target"]["facts"]}
        facts |= {"memory": size(facts["memory"])} if "memory" in facts else {}
        yield html.section(f"Protocol: speed on {target}", html.pairs({**s["protocol"], **facts}.items()), folded=True)


def provenance(artifact: dict[str, Any]) -> str:
    """Where one artifact comes from and what ran it."""
    a, report = artifact["report"]["artifact"], artifact["report"]
    facts: list[tuple[str, Any]] = [("path", a["path"]), ("sha256", a["sha256"]), ("kind", a["kind"])]
    facts += [(f"source: {k}", v) for k, v in (a.get("source") or {}).items()]
    for p in a["passes"]:
        facts += [(f"{p.get('name')}: {k}", v) for k, v in p.items() if k not in ("name", "curve", "losses")]
    events = [f"layer {x['layer']}: {event}" for x in a["layers"] for event in x["events"]]
    facts += [("event", event) for event in events]
    sections = {"quality": report["quality"]} if "quality" in report else {}
    for name, measured in {**sections, **{f"speed, {t}": s for t, s in speeds_of(report).items()}}.items():
        facts += [(f"run by ({name}), {k}", v) for k, v in measured["runtime"].items()]
        facts += [(f"unstable ({name})", why) for why in measured.get("unstable", [])]
    facts += [(f"version: {k}", v) for k, v in report["versions"].items()]
    return html.section(f"Provenance: {artifact['name']}", html.pairs(facts), folded=True)
