"""Checks the options of a step with the config of its command: names, types, then the config's own rules.

There are two validators. Here pydantic checks the types of values, because a recipe may hold any YAML. The config checks
choices, ranges and rules between options (llmc/options.py), because the command line and Python make configs too. Configs
are not pydantic models: importing pydantic would take half the time of every --help.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from decimal import Decimal
from pathlib import Path
from typing import Any, get_args, get_type_hints

from llmc.errors import UserError
from llmc.options import item_type
from llmc.recipes.commands import COMMANDS, PLACEHOLDERS, Command, every_option, options
from llmc.recipes.recipe import RawStep, Recipe, did_you_mean

LINKS = ("of", "teacher")  # keys that name the inputs of a step; they are not options of the command
# {option that names a file: values that are not files}. Options of type Path name files too.
TEXTS: dict[str, tuple[str, ...]] = {
    "calibration": ("self", "hf:"), "text": ("python-docs", "wikitext"), "second_text": ("python-docs", "wikitext"),
    "chat_template": ("keep", "drop"), "tasks": (),
}


@dataclasses.dataclass(frozen=True)
class TypedStep:
    """A step with checked options. config: of the command, with placeholders for the fields that the recipe sets.
    files: {option: the files that it names}."""

    raw: RawStep
    command: Command
    format: str
    config: Any
    files: dict[str, tuple[Path, ...]]
    of: tuple[str, ...] | None
    teacher: str | None

    @property
    def name(self) -> str:
        return self.raw.name

    @property
    def gives(self) -> str:
        return self.format or self.command.gives

    def options(self) -> dict[str, Any]:
        """{option: value} of the config, defaults included, without the fields that the recipe sets."""
        return {name: getattr(self.config, name) for name in options(self.command.name, self.format)}


def type_steps(recipe: Recipe, problems: list[str]) -> list[TypedStep | None]:
    """The steps with checked options. A step with problems becomes None, and `problems` gets them."""
    problems += [f"defaults: no step has an option {name!r}{did_you_mean(name, every_option())}" for name in recipe.defaults
                 if name not in every_option()]
    return [_typed(recipe, raw, problems) for raw in recipe.steps]


def _typed(recipe: Recipe, raw: RawStep, problems: list[str]) -> TypedStep | None:
    command = COMMANDS[raw.command]
    given = dict(raw.options)
    format = _format(raw, given, problems)
    links = {k: given.pop(k) for k in LINKS if k in given}
    if format is None or not _installed(raw, format, problems):
        return None
    known = options(command.name, format)
    given = {**{k: v for k, v in recipe.defaults.items() if k in known}, **given}
    found = len(problems)
    of = _of(raw, links.get("of"), problems)
    teacher = links.get("teacher")
    if teacher is not None and (not isinstance(teacher, str) or "teacher" not in _fields(command, format)):
        problems.append(f"{raw.where('teacher')}: {command.name} takes no teacher" if isinstance(teacher, str)
                        else f"{raw.where('teacher')}: teacher must be a step's name, base, or a model")
    config, files = _config(recipe, raw, command, format, given, problems)
    if config is None or len(problems) > found:
        return None
    return TypedStep(raw, command, format, config, files, of, teacher)


def _fields(command: Command, format: str) -> set[str]:
    return {f.name for f in dataclasses.fields(command.configs[format])}  # type: ignore[arg-type]


def _format(raw: RawStep, given: dict[str, Any], problems: list[str]) -> str | None:
    """The key of the command's config. Removes `format` from the options. None, with a problem, if it is unknown."""
    configs = COMMANDS[raw.command].configs
    if "" in configs:
        return ""
    format = given.pop("format", "gguf")
    if format not in configs:
        problems.append(f"{raw.where('format')}: format {format!r}: must be {' or '.join(configs)}")
        return None
    return str(format)


def _installed(raw: RawStep, format: str, problems: list[str]) -> bool:
    """Add a problem if a package that the command needs is missing. Returns True: the step is still checked."""
    command = COMMANDS[raw.command]
    if missing := [m for m in command.needs.get(format, ()) if importlib.util.find_spec(m) is None]:
        problems.append(f"{raw.where()}: {format} needs the package{'s' if len(missing) > 1 else ''} {', '.join(missing)}: "
                        f"pip install 'llmc-toolkit[{format}]'")
    return True


def _of(raw: RawStep, of: Any, problems: list[str]) -> tuple[str, ...] | None:
    if of is None:
        return None
    names = [of] if isinstance(of, str) else of
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        problems.append(f"{raw.where('of')}: of must be a step's name or a list of them")
        return None
    return tuple(names)


def _config(recipe: Recipe, raw: RawStep, command: Command, format: str, given: dict[str, Any],
            problems: list[str]) -> tuple[Any, dict[str, tuple[Path, ...]]]:
    """The command's config, and the files that it names. The config is None if an option is wrong."""
    import pydantic

    cls = command.configs[format]
    hints, known = get_type_hints(cls), options(command.name, format)
    wrong = len(problems)
    problems += [f"{raw.where(k)}: {command.name} has no option {k!r}{did_you_mean(k, known)}"
                 for k in given if k not in known]
    values: dict[str, Any] = {}
    rules = pydantic.ConfigDict(coerce_numbers_to_str=True)
    for name, value in given.items():
        if name not in known:
            continue
        if isinstance(value, str | int | float) and item_type(hints[name]):
            value = (value,)
        if isinstance(value, float) and str in (hints[name], *get_args(hints[name])):
            value = f"{Decimal(repr(value)):f}"  # 0.00001 as it was written, not 1e-05
        try:
            values[name] = pydantic.TypeAdapter(hints[name], config=rules).validate_python(value)
        except pydantic.ValidationError as e:
            problems.append(f"{raw.where(name)}: {name} {value!r}: {_message(e)}")
        if isinstance(value, bool) and bool not in (hints[name], *get_args(hints[name])):
            problems.append(f"{raw.where(name)}: {name} {str(value).lower()}: it is not a true/false option "
                            "(quote it if it is text)")
    files = {}
    for name in values:
        values[name], files[name] = _with_files(recipe, name, values[name], hints[name])
        problems += [f"{raw.where(name)}: {name}: there is no file {p}" for p in files[name] if not p.exists()]
    required = {k: v for k, v in PLACEHOLDERS.items() if k in _fields(command, format)}
    try:
        config = cls(**required, **values)
        if command.name == "compare":
            from llmc.evals.compare import gates

            gates.parse(config)
    except UserError as e:
        problems += [f"{raw.where()}: {p}" for p in e.problem.split("; ")]
        return None, {}
    return (None if len(problems) > wrong else config), {k: v for k, v in files.items() if v}


def _message(error: Any) -> str:
    """The messages of a pydantic error, shortened."""
    texts = (e["msg"].replace("Input should be", "must be").removeprefix("Value error, ") for e in error.errors())
    return "; ".join(dict.fromkeys(texts))


def _with_files(recipe: Recipe, name: str, value: Any, hint: Any) -> tuple[Any, tuple[Path, ...]]:
    """An option's value with its paths resolved (see Recipe.path), and the files in it."""
    if isinstance(value, Path):
        found = Path(recipe.path(str(value)))
        return found, (found,)
    if name not in TEXTS or value is None:
        return value, ()
    if isinstance(value, tuple):
        parts = [_with_files(recipe, name, v, str) for v in value]
        return tuple(v for v, _ in parts), tuple(p for _, paths in parts for p in paths)
    if name == "tasks":  # 'arc_easy=FILE,piqa'
        named = [item.partition("=") for item in str(value).split(",")]
        paths = [recipe.path(path) if path else "" for _, _, path in named]
        joined = ",".join(f"{task}{sign}{path}" for (task, sign, _), path in zip(named, paths, strict=True))
        return joined, tuple(Path(p) for p in paths if p)
    if any(value == word or (word.endswith(":") and value.startswith(word)) for word in TEXTS[name]):
        return value, ()
    path = recipe.path(str(value))
    return path, (Path(path),)
