#!/usr/bin/env python3
"""Write docs/cli.md, the help of every command, from the commands themselves; `--check` only tells if it is current."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from llmc.cli import app

PAGE = Path(__file__).with_name("cli.md")
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


def main() -> None:
    if "--check" in sys.argv[1:]:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page():
            raise SystemExit(f"{PAGE} is not what the commands say: run `make docs` and commit it")
    else:
        PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
