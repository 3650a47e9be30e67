"""What `llmc fit` says, as tables; estimates are marked with ~ and their interval."""

from __future__ import annotations

from collections.abc import Callable

from llmc.console import size
from llmc.evals.fit.schema import Fit, FitTarget, JudgedFigure, Name
from llmc.evals.report.show import table

MARKS = {"yes": "yes", "no": "NO", "maybe": "maybe", "unknown": "not measured"}
_UNITS: dict[Name, tuple[str, Callable[[float], str]]] = {
    "decode": ("decode tok/s", lambda v: f"{v:.3g}"), "first_token": ("first token s", lambda v: f"{v:.3g}"),
    "kld": ("KLD", lambda v: f"{v:.4f}"), "top1": ("top-1", lambda v: f"{v:.1%}"),
    "ram": ("memory", size), "size": ("file", size),
}


def describe(figure: JudgedFigure, name: Name) -> str:
    """'41.2', '~38 (33 to 45)' of an estimate, '–' where there is none; a limit's answer after it."""
    show = _UNITS[name][1]
    if "mid" not in figure:
        text = "–"
    elif figure["source"] == "estimate":
        text = f"~{show(figure['mid'])} ({show(figure['low'])} to {show(figure['high'])})"
    else:
        text = show(figure["mid"]) + (" UNSTABLE" if "UNSTABLE" in figure["note"] else "")
    return f"{text}: {MARKS[figure['answer']]}" if "answer" in figure else text


def rows(target: FitTarget) -> list[list[str]]:
    """A row for each candidate of one target of `fit`."""
    names = list(dict.fromkeys(n for c in target["candidates"] for n in c["figures"]))
    head = ["candidate", "fits", *(_UNITS[n][0] for n in names)]
    told = ([c["name"], MARKS[c["fits"]], *(describe(c["figures"][n], n) for n in names)] for c in target["candidates"])
    return [head, *told]


def fit_lines(result: Fit) -> str:
    """The whole answer for a terminal."""
    parts = []
    for t in result["targets"]:
        lines = [f"{t['target']}, {result['context']} tokens of context", table(rows(t))]
        if any(f.get("source") == "estimate" for c in t["candidates"] for f in c["figures"].values()):
            lines.append(f"~ estimate (low to high), {t['basis'] or 'file, cache and buffers'}")
        lines += [f"make: {line}" for line in t["advice"]]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
