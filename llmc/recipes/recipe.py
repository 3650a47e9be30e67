"""Parses a recipe: YAML with line numbers, so that an error can name its line.

    about: 4 bits for llama.cpp
    model: base                      # a folder, .gguf or hub id; or --model on the command line
    defaults: {calibration: my.txt}  # options for every step that has them
    steps:
      - quantize: {bits: 4}          # a command of llmc and its options
      - export: gguf                 # or its main option alone
      - eval                         # or nothing at all
      - compare: {max_kld: 0.3}

A step may have `name: NAME` (default: its command) and `of: NAME`, the step that is its input.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from llmc import small_files
from llmc.errors import UserError
from llmc.recipes.commands import COMMANDS
from llmc.small_files import MEGABYTE, parse_yaml, refuse_aliases

BASE, EACH = "base", "each"  # names that no step may have
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,47}")
KEYS = ("about", "model", "defaults", "steps")


@dataclass(frozen=True)
class RawStep:
    """One step as written. lines: {option: line, from 1}, without options of the command line."""

    name: str
    command: str
    options: dict[str, Any]
    line: int
    lines: dict[str, int] = field(default_factory=dict)

    def where(self, option: str | None = None) -> str:
        """The place of the step or of an option, for messages: 'line 7, quantize'."""
        line = self.lines.get(option or "", 0 if option in self.options else self.line)
        return f"line {line}, {self.name}" if line else f"--set {self.name}.{option}"


@dataclass(frozen=True)
class Recipe:
    """A parsed recipe. folder: searched first for relative paths."""

    name: str
    about: str
    model: str | None
    defaults: dict[str, Any]
    steps: tuple[RawStep, ...]
    folder: Path
    text: str

    def path(self, value: str) -> str:
        """A path of the recipe: in the recipe's folder if it exists there, else in the working folder, else unchanged."""
        places = (self.folder / Path(value).expanduser(), Path(value).expanduser())
        return next((str(p.absolute()) for p in places if p.exists()), value)


def shipped() -> list[str]:
    """Names of the recipes that come with llmc."""
    files = resources.files("llmc.recipes").joinpath("shipped").iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def read_text(recipe: str | Path) -> tuple[str, str, Path]:
    """(name, text, folder) of a recipe file or a shipped recipe."""
    path = Path(recipe).expanduser()
    if path.is_file():
        stem = re.sub(r"[^\w.-]+", "-", path.name.removesuffix(".yaml").removesuffix(".yml")).strip(".-")
        return stem or "recipe", small_files.read_text(path, MEGABYTE, "give a YAML file with `steps`"), path.parent
    if str(recipe) in shipped():
        file = resources.files("llmc.recipes").joinpath("shipped", f"{recipe}.yaml")
        return str(recipe), file.read_text(encoding="utf-8"), Path()
    hint = did_you_mean(str(recipe), shipped())
    raise UserError(f"there is no recipe file {recipe}, and llmc ships none of that name{hint}",
                    "give a YAML file, or one of `llmc recipe ls`")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' (did you mean type?)', or '' if nothing is similar."""
    close = difflib.get_close_matches(word, list(known), 1)
    return f" (did you mean {close[0]}?)" if close else ""


def parse(name: str, text: str, folder: Path, problems: list[str]) -> Recipe:
    """Parse `text`. Errors are added to `problems`, and parsing continues. UserError if it is not a YAML mapping."""
    import yaml

    refuse_aliases(text, name)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as e:
        mark = getattr(e, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise UserError(f"{name} is not valid YAML: {where}{getattr(e, 'problem', None) or e}",
                        "see `llmc recipe show edge-4bit`") from e
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{name} is not a recipe: it must be a mapping with `steps`", "see `llmc recipe show edge-4bit`")
    top = _mapping(root, "", problems)
    problems += [f"line {line}: {key!r} is not known: must be {', '.join(KEYS)}{did_you_mean(key, KEYS)}"
                 for key, (_, line) in top.items() if key not in KEYS]
    values = {key: _value(node, problems) for key, (node, _) in top.items() if key in ("about", "model", "defaults")}
    for key, kind in (("about", str), ("model", str), ("defaults", dict)):
        if values.get(key) is not None and not isinstance(values[key], kind):
            problems.append(f"line {top[key][1]}: {key} must be {'a mapping of options' if kind is dict else 'text'}")
            values[key] = None
    node = top["steps"][0] if "steps" in top else None
    if not isinstance(node, yaml.SequenceNode) or not node.value:
        problems.append("steps: there are none; write a list of commands under `steps:`")
    steps = [_raw_step(item, problems) for item in node.value] if isinstance(node, yaml.SequenceNode) else []
    named = _named([s for s in steps if s], problems)
    return Recipe(name, str(values.get("about") or ""), values.get("model"), values.get("defaults") or {}, tuple(named),
                  folder, text)


def _mapping(node: Any, where: str, problems: list[str]) -> dict[str, tuple[Any, int]]:
    """{key: (node of the value, line)}. A repeated key is a problem."""
    found: dict[str, tuple[Any, int]] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if str(key.value) in found:
            problems.append(f"line {line}{where}: {key.value} is given twice")
        found[str(key.value)] = (value, line)
    return found


def _value(node: Any, problems: list[str]) -> Any:
    """The Python value of a node. Anything that safe YAML lacks (`!!python/…`) gives None and a problem."""
    import yaml

    loader = yaml.SafeLoader("")
    try:
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError) as e:  # ValueError: an invalid date
        problems.append(f"line {node.start_mark.line + 1}: {getattr(e, 'problem', None) or e}")
        return None
    finally:
        loader.dispose()


def _raw_step(item: Any, problems: list[str]) -> RawStep | None:
    """Parse `quantize`, `quantize: {type: q4_k}` or `quantize: q4_k`. None, with a problem, if it names no command."""
    import yaml

    line = item.start_mark.line + 1
    if isinstance(item, yaml.ScalarNode):
        command, body = str(item.value), None
    elif isinstance(item, yaml.MappingNode) and len(item.value) == 1:
        command, body = str(item.value[0][0].value), item.value[0][1]
    else:
        problems.append(f"line {line}: a step is one command, as in `- quantize: {{bits: 4}}`, with its options below it")
        return None
    if command not in COMMANDS:
        hint = did_you_mean(command, COMMANDS)
        problems.append(f"line {line}: {command!r} is not a step: must be {', '.join(COMMANDS)}{hint}")
        return None
    if isinstance(body, yaml.MappingNode):
        parts = _mapping(body, f", {command}", problems)
        options = {k: _value(v, problems) for k, (v, _) in parts.items()}
        lines = {k: n for k, (_, n) in parts.items()}
    else:
        value, short = None if body is None else _value(body, problems), COMMANDS[command].short
        options = {} if value is None else {short or "": value}
        lines = dict.fromkeys(options, line)
        if value is not None and short is None:
            problems.append(f"line {line}: write {command}'s options by name, as in `- {command}: {{name: value}}`")
            options = {}
    name = options.pop("name", None)
    return RawStep("" if name is None else str(name), command, options, line, lines)


def _named(steps: list[RawStep], problems: list[str]) -> list[RawStep]:
    """The steps with names: the given name, else the command, with a number from the second on."""
    taken = {s.name for s in steps if s.name}
    named: list[RawStep] = []
    for s in steps:
        name = s.name
        if not name:
            free = (s.command if i == 1 else f"{s.command}-{i}" for i in range(1, len(steps) + 2))
            name = next(n for n in free if n not in taken)
            taken.add(name)
        elif NAME.fullmatch(name) is None or name in (BASE, EACH):
            problems.append(f"line {s.line}: the name {name!r} is not allowed: use letters, digits, '_', '-', '.', at most "
                            f"48, and not {BASE} or {EACH}")
        elif name in {n.name for n in named}:
            problems.append(f"line {s.line}: {name} is the name of an earlier step")
        named.append(replace(s, name=name))
    return named


def override(recipe: Recipe, settings: Mapping[str, Any], problems: list[str]) -> Recipe:
    """The recipe with other values. Keys: 'step.option', 'option' (of the defaults) or 'model'."""
    steps = {s.name: s for s in recipe.steps}
    for key, value in settings.items():
        step, dot, option = key.rpartition(".")
        if not dot:
            recipe = replace(recipe, model=str(value)) if key == "model" else replace(
                recipe, defaults={**recipe.defaults, key: value})
        elif step not in steps:
            hint = did_you_mean(step, steps)
            problems.append(f"--set {key}: there is no step {step!r}: the steps are {', '.join(steps)}{hint}")
        else:
            old = steps[step]
            lines = {k: n for k, n in old.lines.items() if k != option}
            steps[step] = replace(old, options={**old.options, option: value}, lines=lines)
    return replace(recipe, steps=tuple(steps[s.name] for s in recipe.steps))


def setting(text: str) -> tuple[str, str]:
    """Split 'quantize.type=q4_1' into ('quantize.type', 'q4_1')."""
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise UserError(f"--set {text}: write it like --set quantize.type=q4_1", "give STEP.OPTION=VALUE")
    return key.strip(), value


def scalar(text: str) -> Any:
    """A value of the command line, parsed as YAML: 4, 0.5, true, [a, b], q4_1."""
    return parse_yaml(text, repr(text), "quote it")
