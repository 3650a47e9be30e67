"""`llmc compare`."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from llmc.evals.config import CompareConfig


def register(app: typer.Typer) -> None:
    app.command()(compare)


def compare(
    reports: list[Path] = typer.Argument(..., metavar="REPORT…", show_default=False,
                                         help="Reports of llmc eval and llmc bench; the first is the baseline."),
    max_ppl_increase: str | None = typer.Option(CompareConfig.max_ppl_increase, metavar="5%", show_default=False,
                                                help="Gate: rise of the perplexity over the baseline's."),
    max_kld: str | None = typer.Option(CompareConfig.max_kld, metavar="0.1", show_default=False,
                                       help="Gate: mean KL divergence to the base, nats."),
    min_top1: str | None = typer.Option(CompareConfig.min_top1, metavar="80%", show_default=False,
                                        help="Gate: top-1 agreement with the base."),
    min_decode_speedup: str | None = typer.Option(CompareConfig.min_decode_speedup, metavar="2x", show_default=False,
                                                  help="Gate: decode speed over the baseline's."),
    page: Path = typer.Option(CompareConfig.page, help="The HTML page to write."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
    markdown: Path | None = typer.Option(None, "--markdown", metavar="FILE", show_default=False,
                                         help="Write the tables as Markdown, for a pull request; - prints them instead."),
    target: list[str] = typer.Option([], "--target", show_default=False,
                                     help="A target or device profile: estimated where nothing was measured; repeatable."),
    targets: Path | None = typer.Option(CompareConfig.targets, metavar="FILE", show_default=False,
                                        help="The file of targets. Default: ./targets.toml, or the user's own."),
    context: int = typer.Option(CompareConfig.context, help="Tokens in the KV cache of estimates."),
) -> None:
    """Hold reports side by side: a table, a page with pictures, and gates (exit code 1 where one is missed).

    Gates hold for every candidate and every text. Reports with unequal protocols are refused.
    """
    from llmc.console import say
    from llmc.evals.compare import gates
    from llmc.evals.compare.run import compare, without_arrays
    from llmc.evals.compare.tables import tables
    from llmc.evals.pages.compare import write_page
    from llmc.evals.report.show import markdown as to_markdown
    from llmc.evals.report.show import table
    from llmc.files import staged_file

    config = CompareConfig(tuple(reports), max_ppl_increase, max_kld, min_top1, min_decode_speedup, page, tuple(target),
                           targets, context)
    result = compare(config)
    write_page(result, page)
    told = tables(result)
    text = "\n\n".join(f"### {title}\n\n{note}\n\n{to_markdown(rows)}" for title, note, rows in told)
    if markdown is not None and markdown != Path("-"):
        with staged_file(markdown) as tmp:
            tmp.write_text(text + "\n", encoding="utf-8")
    if as_json:
        print(json.dumps(without_arrays(result), indent=2, ensure_ascii=False))
    elif markdown == Path("-"):
        print(text)
    else:
        print("\n\n".join(f"{title}  ({note})\n{table(rows)}" for title, note, rows in told))
    say(f"the page is {page}")
    gates.enforce(result["gates"])
