"""`llmc ship`."""

from __future__ import annotations

import json
from pathlib import Path

import typer


def register(app: typer.Typer) -> None:
    app.command()(ship)


def ship(
    gates: Path = typer.Argument(..., metavar="GATES.yaml", show_default=False,
                                 help="Artifacts, reports, targets and limits."),
    output: Path = typer.Option(Path("ship"), "--out", "-o", metavar="NAME",
                                help="Summary to write, as NAME.json and NAME.md."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Decide whether artifacts may ship to devices, and write a summary with their hashes. Exit code 0 if they may, else 1.

    \b
      artifacts: [small.gguf]
      reports: [base.json, small.json]     # the first is the baseline of perplexity
      run: true                            # measure what the gates need and the reports lack; `base: MODEL` for divergence
      targets:
        pi5: {min_decode: 10, max_first_token: 3, max_ram: 2GB, max_kld: 0.1, min_top1: 80%, stable: true}

    A measured figure can pass a gate. An estimate can pass only with `allow_estimates: true`, and emulated speed never.
    """
    from llmc.console import say
    from llmc.evals.compare.ship import check_summary, read_gates
    from llmc.evals.compare.ship import ship as run
    from llmc.evals.compare.ship_show import lines, summary
    from llmc.files import staged_file, write_json
    from llmc.places import check_markdown

    asked = read_gates(gates)
    place, text = (output.with_name(output.name + suffix) for suffix in (".json", ".md"))
    check_summary(place, asked)
    check_markdown(text, (gates, asked))
    result = run(asked)
    write_json(place, result)
    with staged_file(text) as tmp:
        tmp.write_text(summary(result), encoding="utf-8")
    print(json.dumps(result, indent=2, ensure_ascii=False) if as_json else lines(result))
    say(f"the summary is {output}.json and {output}.md")
    raise typer.Exit(0 if result["passed"] else 1)
