"""Text for the terminal: reports and checked recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmc.console import duration
from llmc.recipes.schema import RunReport, SweepReport


def summary(report: RunReport) -> str:
    """The text that `llmc run` prints: tables, files and the path of the page."""
    from llmc.evals.report.show import tables_text
    from llmc.recipes.page import tables

    ran = report["ran"]
    done = f"{len(ran)} of {len(report['steps'])} steps were run" if ran else "nothing to do: every step is cached"
    files = [f"  {a['name']}: {a['path']}" for a in report["artifacts"] if a["kind"] in ("gguf", "onnx")]
    page = Path(report["folder"]) / f"{report['recipe']['name']}.html"
    totals = "\n".join([f"{done}; {duration(report['seconds'])} of work in all", *files, f"the page is {page}"])
    return f"{tables_text(tables(report))}\n\n{totals}"


def sweep_summary(result: SweepReport) -> str:
    """The text that `llmc sweep` prints."""
    from llmc.evals.report.show import tables_text
    from llmc.recipes.sweep_page import tables

    page = Path(result["folder"]) / f"{result['recipe']}-sweep.html"
    return f"{tables_text(tables(result))}\n\n{len(result['ran'])} steps were run\nthe page is {page}"


def chain_lines(chain: Any) -> str:
    """A checked recipe as text: each step with its inputs and options."""
    from llmc.evals.report.show import plain
    from llmc.recipes.report import changed_options

    lines = [f"{chain.recipe.name}: {len(chain.steps)} steps, from {chain.base or 'the model of --model'}"]
    for s in chain.steps:
        options = ", ".join(f"{k} {plain(v)}" for k, v in changed_options(s).items()) or "defaults"
        teacher = f", teacher {s.teacher}" if s.teacher else ""
        lines.append(f"  {s.name}: {s.command} of {', '.join(s.inputs)}{teacher} ({options})")
    return "\n".join(lines)
