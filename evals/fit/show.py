"""The result of `llmc fit` as tables. An estimate is marked with ~ and shown with its interval."""

from __future__ import annotations

from collections.abc import Callable

from llmc.console import size
from llmc.evals.fit.schema import Fit, FitTarget, JudgedFigure, Name
from llmc.evals.report.show import table

MARKS = {"yes": "yes", "no": "NO", "maybe": "maybe", "unknown": "not measured"}
_UNITS: dict[Name, tuple[str, Callable[[float], str]]] = {
    "decode": ("decode tok/s", lambda v: f"{v:.3g}"), "first_token": ("first token s", lambda v: f"{v:.3g}"),
    "kld": ("KLD", lambda v: f"{v:z.4f}"), "kld_p99": ("KLD, 99 %", lambda v: f"{v:z.3f}"),
    "kld_p999": ("KLD, 99.9 %", lambda v: f"{v:z.3f}"), "top1": ("top-1", lambda v: f"{v:.1%}"),
    "ram": ("memory", size), "size": ("file", size),
}


def describe(figure: JudgedFigure, name: Name) -> str:
    """A metric as text: '41.2' if measured, '~38 (33 to 45)' if estimated, '–' if unknown; then the answer to its limit."""
    show = _UNITS[name][1]
    if "mid" not in figure:
        text = "–"
    elif figure["source"] == "estimate":
        text = f"~{show(figure['mid'])} ({show(figure['low'])} to {show(figure['high'])})"
    else:
        text = show(figure["mid"]) + (" UNSTABLE" if "UNSTABLE" in figure["note"] else "")
    return f"{text}: {MARKS[figure['answer']]}" if "answer" in figure else text


def rows(target: FitTarget) -> list[list[str]]:
    """The table of one target: a heading, then a row for each candidate."""
    names = list(dict.fromkeys(n for c in target["candidates"] for n in c["figures"]))
    head = ["candidate", "fits", "a token reads", *(_UNITS[n][0] for n in names)]
    body = ([c["name"], MARKS[c["fits"]], "–" if c["token_bytes"] is None else size(c["token_bytes"]),
             *(describe(c["figures"][n], n) for n in names)] for c in target["candidates"])
    return [head, *body]


def fit_lines(result: Fit) -> str:
    """The result of `llmc fit` as text for a terminal."""
    parts = []
    for t in result["targets"]:
        lines = [f"{t['target']}, {result['context']} tokens of context", table(rows(t))]
        if any(f.get("source") == "estimate" for c in t["candidates"] for f in c["figures"].values()):
            lines.append(f"~ estimate (low to high), {t['basis'] or 'file, cache and buffers'}")
        lines += [f"make: {line}" for line in t["advice"]]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
