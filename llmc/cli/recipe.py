"""`llmc recipe ls|show|cp|validate`."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from llmc.cli.group import Commands

group = typer.Typer(cls=Commands, no_args_is_help=True, rich_markup_mode=None, help="List, copy and check recipes.")


def register(app: typer.Typer) -> None:
    app.add_typer(group, name="recipe")


@group.command("ls")
def ls(as_json: bool = typer.Option(False, "--json", help="Print one JSON object.")) -> None:
    """List the recipes that come with llmc."""
    from llmc.recipes.recipe import parse, read_text, shipped

    found = {name: parse(*read_text(name), []).about for name in shipped()}
    if as_json:
        print(json.dumps({"recipes": found}, indent=2, ensure_ascii=False))
    else:
        wide = max(map(len, found))
        print("\n".join(f"{name:<{wide}}  {about}" for name, about in found.items()))


@group.command("show")
def show(recipe: str = typer.Argument(..., help="A name of `llmc recipe ls`, or a file.")) -> None:
    """Print a recipe."""
    from llmc.recipes.recipe import read_text

    print(read_text(recipe)[1], end="")


@group.command("cp")
def cp(recipe: str = typer.Argument(..., help="A name of `llmc recipe ls`, or a file."),
       file: Path = typer.Argument(..., help="File to write. It must not exist yet.")) -> None:
    """Copy a recipe, to change it."""
    from llmc.console import command, say
    from llmc.errors import UserError
    from llmc.files import staged_file
    from llmc.recipes.recipe import read_text

    name, text, _ = read_text(recipe)
    place = file / f"{name}.yaml" if file.is_dir() else file
    if place.exists():
        raise UserError(f"{place} exists already", "choose another name")
    with staged_file(place) as tmp:
        tmp.write_text(text, encoding="utf-8")
    say(f"{place}: change it, then `{command('llmc', 'recipe', 'validate', place)}`")


@group.command("validate")
def validate(
    recipe: str = typer.Argument(..., help="A file, or a name of `llmc recipe ls`."),
    model: str | None = typer.Option(None, show_default=False, help="Base model, if the recipe names none."),
    settings: list[str] = typer.Option([], "--set", metavar="STEP.OPTION=VALUE", show_default=False,
                                       help="Another value of an option."),
) -> None:
    """Check a recipe: every option and the inputs of every step. It prints all problems at once and runs nothing."""
    from llmc.recipes.chain import load
    from llmc.recipes.recipe import setting
    from llmc.recipes.show import chain_lines

    print(chain_lines(load(recipe, model, dict(setting(s) for s in settings), need_model=False)))
