#!/usr/bin/env python3
"""Write docs/cli.md, the help of every command, from the commands themselves, and docs/models.md and README.md's list of
families from the table of `llmc models`; `--check` only tells if they are current."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from llmc.about.models import markdown, models, summary
from llmc.cli import app

PAGE, MODELS = (Path(__file__).with_name(name) for name in ("cli.md", "models.md"))
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- models: made by docs/generate.py -->", "<!-- end of models -->"
WIDTH = 100
INTRODUCTION = """What `llmc --help` and `llmc COMMAND --help` print. Written by `make docs`: change the code instead.

Exit codes: 0 done; 1 a gate of `llmc compare` was missed; 2 bad input or environment; 70 a bug in llmc; 130 Ctrl-C
(129 SIGHUP, 143 SIGTERM)."""


def page() -> str:
    """The whole page."""
    group = typer.main.get_command(app)
    root = group.make_context("llmc", [], resilient_parsing=True, terminal_width=WIDTH, max_content_width=WIDTH)
    parts = ["# Commands", "", INTRODUCTION, "", *_block("llmc", group.get_help(root))]
    for name in group.list_commands(root):
        command = group.get_command(root, name)
        context = command.context_class(command, info_name=name, parent=root)
        parts += _block(f"llmc {name}", command.get_help(context))
        for inner in getattr(command, "commands", {}).values():
            below = inner.context_class(inner, info_name=inner.name, parent=context)
            parts += _block(f"llmc {name} {inner.name}", inner.get_help(below))
    return "\n".join(parts)


def _block(title: str, text: str) -> list[str]:
    return [f"## {title}", "", "```text", *(line.rstrip() for line in text.strip().splitlines()), "```", ""]


def models_page() -> str:
    """docs/models.md."""
    return f"""# Model families

What `llmc models` prints. Written by `make docs` from the tables that the commands use and from
`llmc/families/proved.json`, which `make test-models` writes. `family` is `model_type` in config.json. Other decoder-only
models of transformers can be quantized, and pruned by masks and by depth, too: each command says if it cannot.

{markdown(models())}
"""


def readme() -> str:
    """README.md with its list of families."""
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n{summary(models())}\n{END}{rest.partition(END)[2]}"


def pages() -> dict[Path, str]:
    """Every file that is written here."""
    return {PAGE: page(), MODELS: models_page(), README: readme()}


def main() -> None:
    for path, text in pages().items():
        if "--check" not in sys.argv[1:]:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            raise SystemExit(f"{path} is not what the program says: run `make docs` and commit it")


if __name__ == "__main__":
    main()
