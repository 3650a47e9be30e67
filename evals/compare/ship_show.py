"""The summary of `llmc ship` as Markdown, for a pull request or a release."""

from __future__ import annotations

from typing import Any

from llmc.console import size
from llmc.evals.fit.show import describe
from llmc.evals.report.show import markdown, table
from llmc.evals.report.tables import Table

NAMES = {"decode": "decode tok/s", "first_token": "first token s", "kld": "KLD", "top1": "top-1", "ram": "memory",
         "size": "file", "ppl_increase": "perplexity over the first report's", "stable": "stable"}


def tables(result: dict[str, Any]) -> list[Table]:
    """What would ship, then every gate."""
    files = [["artifact", "ships", "size", "sha256"],
             *([a["name"], "yes" if a["ships"] else "NO", size(a["bytes"]), a["sha256"]] for a in result["artifacts"])]
    rows = [["artifact", "target", "gate", "limit", "figure", "source", "verdict"]]
    for a in result["artifacts"]:
        for r in a["results"]:
            verdict = "passed" if r["passed"] else f"MISSED: {r['why']}"
            rows.append([a["name"], r["target"], NAMES[r["gate"]], _shown(r["gate"], r["limit"]), _figure(r),
                         r["source"] or "–", verdict])
    how = "estimates may pass gates" if result["allow_estimates"] else "estimates pass no gate"
    note = f"{result['context']} tokens of context, prompts of {result['prompt']}; {how}; emulated speed never does"
    return [("What may ship", "hashed when this was written", files), ("Gates", note, rows)]


def _figure(r: dict[str, Any]) -> str:
    if r["figure"] is None:
        return "–"
    if r["gate"] == "ppl_increase":
        return f"{r['figure']['mid']:+.1%}"
    return describe({**r["figure"], "source": r["source"]}, r["gate"])


def _shown(gate: str, limit: Any) -> str:
    if gate == "stable":
        return "yes"
    if gate == "ppl_increase":
        return f"{limit:.1%}"
    return describe({"mid": limit, "source": "measured", "note": ""}, gate)


def summary(result: dict[str, Any]) -> str:
    """The whole as Markdown: verdict, tables, then who ran it, where, when and with which versions. Nothing is signed."""
    verdict = "**May ship.**" if result["passed"] else "**Must not ship.**"
    s = result["signed"]
    parts = [f"# llmc ship: {result['gates']}", verdict]
    parts += [f"## {title}\n\n{note}\n\n{markdown(rows)}" for title, note, rows in tables(result)]
    used = ", ".join(f"{k} {v}" for k, v in s["versions"].items())
    return "\n\n".join([*parts, f"{s['by']} on {s['host']}, {s['at']}; {used}"]) + "\n"


def lines(result: dict[str, Any]) -> str:
    """The same for a terminal, hashes short."""
    files, gates = tables(result)
    short = [[*row[:3], row[3][:16] + ("…" if len(row[3]) > 16 else "")] for row in files[2]]
    told = "may ship" if result["passed"] else "must not ship"
    return f"{table(short)}\n\n{gates[1]}\n{table(gates[2])}\n\n{told}"
