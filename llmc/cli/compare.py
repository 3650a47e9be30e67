"""`llmc compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from llmc.cli.options import Json, add
from llmc.evals.compare.config import CompareConfig
from llmc.options import RUN


def register(app: typer.Typer) -> None:
    add(app, compare, CompareConfig)


def compare(
    config: CompareConfig, as_json: Json = False,
    markdown: Annotated[Path | None, typer.Option("--markdown", metavar="FILE", rich_help_panel=RUN, help=(
        "Write the tables as Markdown, for a pull request. - prints them instead."))] = None,
) -> None:
    """Compare reports: print a table, write a page with charts, and check gates. A missed gate gives exit code 1.

    Gates apply to every candidate and every text. A gate passes if the whole interval (two standard errors) meets the limit.
    If the limit lies inside the interval, the gate is not decided; the exit code is 1 too. Reports with different protocols
    are refused.
    """
    from llmc.console import say
    from llmc.errors import UserError
    from llmc.evals.compare import gates
    from llmc.evals.compare.run import compare, without_arrays
    from llmc.evals.compare.tables import tables
    from llmc.evals.pages.compare import write_page
    from llmc.evals.report.show import tables_markdown, tables_text
    from llmc.files import staged_file
    from llmc.places import check_markdown, real

    page = config.page
    if markdown is not None and markdown != Path("-"):
        check_markdown(markdown, (config, page), "choose another file with --markdown")
        if real(markdown) == real(page):
            raise UserError(f"--page and --markdown both name {page}", "choose another file with --markdown")
    result = compare(config)
    write_page(result, page)
    report_tables = tables(result)
    text = tables_markdown(report_tables, level=3)
    if markdown is not None and markdown != Path("-"):
        with staged_file(markdown) as tmp:
            tmp.write_text(text + "\n", encoding="utf-8")
    if as_json:
        print(json.dumps(without_arrays(result), indent=2, ensure_ascii=False))
    elif markdown == Path("-"):
        print(text)
    else:
        print(tables_text(report_tables))
    say(f"the page is {page}")
    gates.enforce(result["gates"])
