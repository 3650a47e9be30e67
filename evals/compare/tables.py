"""A comparison as tables. The terminal, the Markdown output and the page show the same tables."""

from __future__ import annotations

from llmc.console import size
from llmc.evals.compare.gates import describe, verdict
from llmc.evals.compare.matrix import held
from llmc.evals.compare.schema import Cell, Compared, Comparison, GateResult
from llmc.evals.report.schema import BudgetText, Kld
from llmc.evals.report.sections import budget_of, quality_of, speeds_of, targets_of, tasks_of, texts_of
from llmc.evals.report.show import Table, change, filled, matrices, median_iqr, pm


def tables(comparison: Comparison) -> list[Table]:
    """The tables of a comparison: size, budgets, quality on each text, tasks, speed, devices, gates; without empty tables."""
    artifacts = comparison["artifacts"]
    out = [_sizes(artifacts)]
    if any(budget_of(a["report"]) for a in artifacts):
        out.append(_budgets(artifacts))
    evaluated = [a for a in artifacts if quality_of(a["report"])]
    if evaluated:
        out += [_quality(evaluated, i) for i in range(len(texts_of(evaluated[0]["report"])))]
        if any(tasks_of(a["report"]) for a in evaluated):
            out.append(_tasks(evaluated))
    for target in targets_of([a["report"] for a in artifacts]):
        out.append(_speed([a for a in artifacts if target in speeds_of(a["report"])], target))
    cells = comparison["matrix"]
    if not all((c["target"], c["source"]) == (cells[0]["target"], "measured") for c in cells):
        out.append(_devices(cells))  # otherwise the speed table of the one device has the same values
    if comparison["gates"]:
        out.append(gates_table(comparison["gates"]))
    return out


def _sizes(artifacts: list[Compared]) -> Table:
    rows = [["artifact", "file", "of baseline", "a token reads", "bits/weight", "in decoder", "matrices"]]
    for a in artifacts:
        w = a["report"]["artifact"]["size"]
        ratio = f"{a['differences']['size_ratio']:.1%}" if a["differences"] else "100%"
        rows.append([a["name"], size(w["file_bytes"]), ratio, size(w["token_bytes"]), f"{w['bits_per_weight']:.2f}",
                     f"{w['decoder_bits_per_weight']:.2f}", matrices(w)])
    return "Size", "a token reads: weights, when decoding; in decoder: bits per weight of the matrices in its layers", rows


def _quality(artifacts: list[Compared], index: int) -> Table:
    """The table of one text. Differences of KLD and top-1 are shown only if the baseline itself differs from the base."""
    first = texts_of(artifacts[0]["report"])[index]
    p, baseline = first["protocol"], first["kld"]
    lossy = baseline is not None and baseline["value"] > 0
    rows = [["artifact", "perplexity", "to baseline", "bits/byte", "KLD, nats", *(["Δ KLD"] if lossy else []), "KLD, 99 %",
             "99.9 %", "top-1 %", *(["Δ top-1"] if lossy else [])]]
    for a in artifacts:
        t, d = texts_of(a["report"])[index], a["differences"]
        paired = d["texts"][index] if d and d["texts"] else None
        rows.append([
            a["name"], pm(t["perplexity"], 2), change(paired["perplexity_ratio"]) if paired else "–",
            pm(t["bits_per_byte"], 3), pm(t["kld"], 4),
            *([pm(paired["kld"] if paired else None, 4, sign=True)] if lossy else []),
            *_tails(t["kld"]), pm(t["top1"], 1, 100),
            *([pm(paired["top1"] if paired else None, 1, 100, sign=True)] if lossy else []),
        ])
    return (f"Quality on {p['text']}", f"{p['chunks']} chunks of {p['context']} tokens; ± is one standard error, "
            "differences from the baseline are paired by token; KLD, 99 %: so many tokens have no more", rows)


def _tails(kld: Kld | None) -> tuple[str, str]:
    """The KL divergence that 99 and 99.9 % of the tokens do not exceed."""
    if kld is None:
        return "–", "–"
    tails = kld.get("tails")
    return (pm(tails["p99"], 3), pm(tails["p999"], 3)) if tails else (f"{kld['p99']:.3f}", "–")


def _budgets(artifacts: list[Compared]) -> Table:
    """Predicted and measured KL divergence. It has a row for each text and each artifact whose types a budget chose."""
    rows = [["artifact", "target", "file planned", "file", "KLD predicted", "text", "KLD measured", "to predicted"]]
    healed = False
    for a in artifacts:
        if (budget := budget_of(a["report"])) is None:
            continue
        healed = healed or budget["healed"]
        file = "–" if budget["file_bytes"] is None else size(budget["file_bytes"])
        plan = [a["name"], budget["target"], size(budget["planned_bytes"]), file, f"{budget['predicted_kld']:.4f}"]
        measured: list[BudgetText | None] = [*budget["measured"]]
        for m in measured or [None]:
            found = ["–", "–", "–"] if m is None else [
                m["text"], pm({"value": m["kld"], "se": m["se"]}, 4), "–" if m["ratio"] is None else f"{m['ratio']:.2f}x"]
            rows.append([*plan, *found])
    return ("Budget", "predicted on calibration text when the types were chosen; file: of the exported .gguf"
            + ("; the artifact was healed after the prediction" if healed else ""), rows)


def _tasks(artifacts: list[Compared]) -> Table:
    """A row for each task and each artifact with results on it."""
    rows = [["task", "artifact", "items", "acc %", "Δ acc", "acc_norm %", "Δ acc_norm", "perplexity", "to baseline"]]
    names = dict.fromkeys(name for a in artifacts for name in tasks_of(a["report"]))
    for name, a in ((name, a) for name in names for a in artifacts if name in tasks_of(a["report"])):
        t = tasks_of(a["report"])[name]
        d = a["differences"]
        difference = d["tasks"].get(name) if d and d["tasks"] else None
        ratio = difference and difference["perplexity_ratio"]
        rows.append([name, a["name"], f"{t['protocol']['items']} of {t['protocol']['of']}",
                     pm(t["acc"], 1, 100), pm(difference and difference["acc"], 1, 100, sign=True),
                     pm(t["acc_norm"], 1, 100), pm(difference and difference["acc_norm"], 1, 100, sign=True),
                     pm(t["perplexity"], 2), change(ratio) if ratio else "–"])
    return ("Tasks", "zero-shot, scored by log-likelihood as lm-evaluation-harness does; acc_norm: divided by the answer's "
            "length; perplexity: of the last word; ± is one standard error, differences from the baseline are paired by item",
            filled(rows))


def _speed(artifacts: list[Compared], target: str) -> Table:
    rows = [["artifact", "load s", "first token s", "prefill tok/s", "decode tok/s", "speedup", "peak memory", "GB/s",
             "verdict"]]
    for a in artifacts:
        s = speeds_of(a["report"])[target]
        d = a["differences"]
        changes = d["speeds"].get(target) if d and d["speeds"] else None
        rows.append([
            a["name"], f"{s['load_s']:.2f}",
            median_iqr(s["first_token"], 3), median_iqr(s["prefill"]), median_iqr(s["decode"]),
            pm(changes and changes["decode_speedup"], 2, unit="x"), size(s["peak_rss"]), f"{s['read_bandwidth'] / 1e9:.1f}",
            "emulated" if s["target"]["emulated"] else "UNSTABLE" if s["unstable"] else "stable",
        ])
    s = speeds_of(artifacts[0]["report"])[target]
    p = s["protocol"]
    return (f"Speed on {target}", f"{p['cpu']}, threads {p['threads']}, {p['device']}; prompt of {p['prompt']} tokens; "
            f"{p['generate']} tokens decoded at depth {p['depth']}; medians [IQR]; GB/s: weights read while decoding", rows)


def _devices(cells: list[Cell]) -> Table:
    """Decode speed, time to first token and memory by artifact and device."""
    targets = list(dict.fromkeys(c["target"] for c in cells))
    artifacts = list(dict.fromkeys(c["artifact"] for c in cells))
    by = {(c["artifact"], c["target"]): c for c in cells}
    rows = [["artifact", *(f"{t}{what}" for t in targets for what in (": decode tok/s", ": first token s", ": memory"))]]
    for a in artifacts:
        rows.append([a, *(text for t in targets for text in _cell(by.get((a, t))))])
    notes = ["★: on the Pareto front of decode speed and KLD of its device"]
    notes += ["~: an estimate (low to high)"] if any(c["source"] == "estimate" for c in cells) else []
    notes += ["emulated: not the device's speed, never compared"] if any(c["source"] == "emulated" for c in cells) else []
    return "Devices", "; ".join(notes), filled(rows)


def _cell(c: Cell | None) -> list[str]:
    if c is None:
        return ["–"] * 3
    ram = size(held(c))
    first = min(c["first_token"], key=lambda p: abs(p["tokens"] - 512), default=None)
    if c["source"] == "estimate":
        first_token = "–" if first is None else f"~{first['mid']:.3g} ({first['tokens']} tokens)"
        d = c["decode"]
        low, mid, high = (f"{v:.3g}" for v in (d["low"], d["mid"], d["high"]))
        return [f"~{mid} ({low} to {high}){_star(c)}", first_token, f"~{ram}"]
    mark = " emulated" if c["source"] == "emulated" else " UNSTABLE" if c["unstable"] else ""
    first_token = "–" if first is None else f"{first['mid']:.3g} ({first['tokens']} tokens){mark}"
    return [f"{c['decode']['mid']:.1f}{mark}{_star(c)}", first_token, ram]


def _star(c: Cell) -> str:
    return " ★" if c["front"] else ""


def gates_table(results: list[GateResult]) -> Table:
    """A row for each gate of each candidate."""
    rows = [["gate", "verdict"], *([describe(r), verdict(r)] for r in results)]
    return "Gates", "each gate is checked for every candidate, text and target; the whole interval must meet the limit", rows
