"""`llmc setup converter`."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from llmc.cli.group import Commands

group = typer.Typer(cls=Commands, no_args_is_help=True, rich_markup_mode=None,
                    help="Get llama.cpp's converter, for `llmc export`.")


@group.callback()
def _group() -> None:
    pass


def register(app: typer.Typer) -> None:
    app.add_typer(group, name="setup")


@group.command("converter")
def converter(
    sdist: Path | None = typer.Option(None, "--sdist", metavar="FILE", show_default=False,
                                      help="The source archive of the installed llama-cpp-python, if there is no network."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Get llama.cpp's converter, for `llmc export` of architectures that llmc does not write itself.

    It comes from the source archive of the installed llama-cpp-python, so that both are of one llama.cpp. The archive is
    downloaded from the package index that pip uses, and its hash is checked. The converter is unpacked into llmc's cache.
    Nothing is built or run.
    """
    from llmc.sources.llama_cpp import setup_converter

    done = setup_converter(sdist)
    if as_json:
        print(json.dumps(done, indent=2))
        return
    already = "" if done["new"] else " was there already"
    print(f"{done['path']}: the converter of llama-cpp-python {done['version']}{already}")
