"""Commands from configs: a command's options are made from the fields of its config (llmc/options.py)."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import MISSING
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer
import typer.core

from llmc.options import ADVANCED, CALIBRATION, MAIN, RUN, Option, declared, flag, item_type, make

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.", rich_help_panel=RUN)]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print the report as Markdown.", rich_help_panel=RUN)]
READY = ("config", "options")  # parameters of a command's function that receive the options


def add(app: typer.Typer, function: Callable[..., None], *configs: type, name: str | None = None) -> None:
    """Add `function` to `app` as a command with its own parameters and, if it has configs, their options.

    If the function has a parameter `config`, it receives a ready config of the first class. If it has a parameter `options`,
    it receives the options as a dict by field name. The options stand in --help where this parameter stands. All values are
    passed by name.
    """
    own = inspect.signature(function, eval_str=True).parameters
    made = parameters(*configs)

    def command(**values: Any) -> None:
        options = {name: values.pop(name) for name in made}
        ready = {"config": make(configs[0], options)} if "config" in own else {"options": options} if "options" in own else {}
        function(**values, **ready)

    signature: list[inspect.Parameter] = []
    for parameter in own.values():
        signature += made.values() if parameter.name in READY else [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)]
    command.__name__, command.__doc__, command.__annotations__ = function.__name__, function.__doc__, {}
    command.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
    app.command(name, cls=Grouped)(command)


def parameters(*configs: type) -> dict[str, inspect.Parameter]:
    """{field: parameter} of the options of `configs`. A field that several have is taken from the first."""
    found: dict[str, inspect.Parameter] = {}
    for config in configs:
        hints = get_type_hints(config)
        for name, (field, option) in declared(config).items():
            found.setdefault(name, _parameter(name, option, hints[name], field.default))
    return found


def _parameter(name: str, option: Option, hint: Any, default: Any) -> inspect.Parameter:
    shown: dict[str, Any] = {"metavar": option.metavar, "help": help_text(option), "hidden": option.hidden,
                             "show_default": option.shown or default not in (None, ())}
    if option.argument:
        info: Any = typer.Argument(**shown)
        default = default or None  # click 8.1 does not accept an empty list here
    else:
        flags = option.flags or (flag(name, option),)  # always named: typer would add --no-NAME to an unnamed switch
        info = typer.Option(*flags, rich_help_panel=option.group, **shown)
    if item_type(hint) is int and default is not MISSING:
        default = ",".join(map(str, default)) or None
    default = inspect.Parameter.empty if default is MISSING else list(default) if isinstance(default, tuple) else default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[_typed(hint), info])


def _typed(hint: Any) -> Any:
    """The type that typer reads: a list for a tuple, 'N,N' for a tuple of numbers, text where path and text are allowed."""
    if (item := item_type(hint)) is not None:
        return str | None if item is int else list[item]  # type: ignore[valid-type]
    return str | None if {str, Path} <= {*get_args(hint)} else hint


def help_text(option: Option) -> str:
    """The help of an option. Its allowed values are added unless the help names each of them."""
    named = option.choices and all(re.search(rf"(?<![\w+]){re.escape(str(c))}(?![\w+])", option.help) for c in option.choices)
    return option.help if named or not option.rule else f"{option.help} Allowed: {option.rule.removeprefix('one of ')}."


class Grouped(typer.core.TyperCommand):
    """A command whose --help lists the options by group. It is plain text: typer's own panels need rich and a terminal."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {"Arguments": [], MAIN: [], CALIBRATION: []}
        last: dict[str, list[tuple[str, str]]] = {ADVANCED: [], RUN: []}
        for param in self.get_params(ctx):
            if record := param.get_help_record(ctx):
                group = getattr(param, "rich_help_panel", None) or MAIN
                if param.param_type_name == "argument":
                    group = "Arguments"
                elif param.name == "help" and last[RUN]:
                    group = RUN
                (last if group in last else groups).setdefault(group, []).append(record)
        for group, records in (groups | last).items():
            if records:
                with formatter.section(group):
                    formatter.write_dl(records)
