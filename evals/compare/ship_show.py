"""The summary of `llmc ship` as Markdown, for a pull request or a release."""

from __future__ import annotations

from typing import cast

from llmc.console import size
from llmc.evals.compare.schema import Shipping, Verdict
from llmc.evals.fit.schema import Name
from llmc.evals.fit.show import describe
from llmc.evals.report.show import Table, table, tables_markdown

NAMES = {"decode": "decode tok/s", "first_token": "first token s", "kld": "KLD", "kld_p99": "KLD, 99 %",
         "kld_p999": "KLD, 99.9 %", "top1": "top-1", "ram": "memory",
         "size": "file", "ppl_increase": "perplexity over the first report's", "stable": "stable"}


def tables(result: Shipping) -> list[Table]:
    """Two tables: the artifacts, and the results of every gate."""
    files = [["artifact", "ships", "size", "sha256"],
             *([a["name"], "yes" if a["ships"] else "NO", size(a["bytes"]), a["sha256"]] for a in result["artifacts"])]
    rows = [["artifact", "target", "gate", "limit", "figure", "source", "verdict"]]
    for a in result["artifacts"]:
        for r in a["results"]:
            verdict = "passed" if r["passed"] else r["why"].replace("not decided", "NOT DECIDED", 1) \
                if r["answer"] == "maybe" else f"MISSED: {r['why']}"
            rows.append([a["name"], r["target"], NAMES[r["gate"]], _shown(r["gate"], r["limit"]), _figure(r),
                         r["source"] or "–", verdict])
    how = "an estimate may pass a gate" if result["allow_estimates"] else "an estimate never passes"
    note = (f"{result['context']} tokens of context, prompts of {result['prompt']} tokens; {how}; an emulated speed never "
            "passes")
    return [("Artifacts", "sha256: computed when this summary was written", files), ("Gates", note, rows)]


def _figure(r: Verdict) -> str:
    if (figure := r["figure"]) is None:
        return "–"
    if r["gate"] == "ppl_increase":
        return f"{figure['mid']:+.1%}"
    return describe({**figure, "source": r["source"] or ""}, cast(Name, r["gate"]))


def _shown(gate: str, limit: float) -> str:
    if gate == "stable":
        return "yes"
    if gate == "ppl_increase":
        return f"{limit:.1%}"
    return describe({"mid": limit, "source": "measured", "note": ""}, cast(Name, gate))


def summary(result: Shipping) -> str:
    """The summary as Markdown: verdict, tables, then the user, the host, the time and the versions. Nothing is signed."""
    verdict = "**May ship.**" if result["passed"] else "**Must not ship.**"
    s = result["signed"]
    used = ", ".join(f"{k} {v}" for k, v in s["versions"].items())
    return "\n\n".join([f"# llmc ship: {result['gates']}", verdict, tables_markdown(tables(result)),
                        f"{s['by']} on {s['host']}, {s['at']}; {used}"]) + "\n"


def lines(result: Shipping) -> str:
    """The tables and the verdict as text for a terminal. Hashes are shortened."""
    files, gates = tables(result)
    short = [[*row[:3], row[3][:16] + ("…" if len(row[3]) > 16 else "")] for row in files[2]]
    verdict = "may ship" if result["passed"] else "must not ship"
    return f"{table(short)}\n\n{gates[1]}\n{table(gates[2])}\n\n{verdict}"
