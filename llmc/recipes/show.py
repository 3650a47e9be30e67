"""A report of a chain for the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmc.console import duration


def summary(report: dict[str, Any]) -> str:
    """What `llmc run` prints: the tables, the files, and where the page is."""
    from llmc.evals.show import table
    from llmc.recipes.page import tables

    ran = report["ran"]
    done = f"{len(ran)} of {len(report['steps'])} steps were run" if ran else "nothing to do: every step is as it was"
    found = [f"{title}  ({note})\n{table(rows)}" for title, note, rows in tables(report)]
    files = [f"  {a['name']}: {a['path']}" for a in report["artifacts"] if a["kind"] in ("gguf", "onnx")]
    page = Path(report["folder"]) / f"{report['recipe']['name']}.html"
    return "\n\n".join([*found, "\n".join([f"{done}; {duration(report['seconds'])} of work in all", *files,
                                           f"the page is {page}"])])
