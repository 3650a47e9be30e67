"""Options, declared once: each is a field of its command's config, and the field carries help, allowed values and group.

The command line (llmc/cli/options.py), the Python API (llmc/__init__.py) and recipes (llmc/recipes/typed.py) all read these
fields. Nothing heavy is imported here, so that `--help` stays fast.

    @dataclass(frozen=True, kw_only=True)
    class PaintConfig:
        coats: int = option(2, help="Number of coats.", low=1)
        colour: str = option("red", help="Colour of the paint.", choices=("red", "blue"))

        def __post_init__(self) -> None:
            check(self, "paint")
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from llmc.errors import UserError

MAIN, CALIBRATION, ADVANCED, RUN = "Options", "Calibration", "Advanced", "Run"  # groups, by their headings in --help
FEW = 4  # up to this number, choices are shown as "a, b or c", more as "one of a, b, c"

Config = TypeVar("Config")


@dataclass(frozen=True)
class Option:
    """The declaration of an option, beside the field's name, type and default.

    choices: the allowed values. low, high: the smallest and the largest allowed number.
    above, below: exclusive bounds. flags: the flags on the command line, if not `--field-name`.
    metavar: the placeholder of the value in --help. shown: the default in words, if the default is None.
    argument: it is a positional argument without a flag. hidden: --help does not show it.

    Bounds apply to each item of a tuple. None is always allowed.
    """

    help: str
    group: str = MAIN
    choices: tuple[Any, ...] = ()
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    flags: tuple[str, ...] = ()
    metavar: str | None = None
    shown: str | None = None
    argument: bool = False
    hidden: bool = False

    @property
    def rule(self) -> str:
        """The allowed values in words, to follow "must be"; '' if all are allowed."""
        if self.choices:
            *first, last = map(str, self.choices)
            if len(self.choices) > FEW:
                return f"one of {', '.join([*first, last])}"
            return f"{', '.join(first)} or {last}" if first else last
        if self.above is not None and self.below is not None:
            return f"between {self.above} and {self.below}"
        if self.low is not None and self.high is not None:
            return f"{self.low} to {self.high}"
        bounds = {"at least": self.low, "above": self.above, "at most": self.high, "below": self.below}
        return " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)

    def allows(self, value: Any) -> bool:
        """True if `value` is one of the choices and within the bounds. NaN is never within bounds."""
        return ((not self.choices or value in self.choices)
                and (self.low is None or value >= self.low) and (self.above is None or value > self.above)
                and (self.high is None or value <= self.high) and (self.below is None or value < self.below))


def option(default: Any = MISSING, *, help: str, **declared: Any) -> Any:
    """A dataclass field that is an option. Without a default it is required. `declared`: the other fields of Option."""
    return dataclasses.field(default=default, metadata={"option": Option(help, **declared)})


def like(config: type, name: str, **changed: Any) -> Any:
    """A field with the declaration of the field `name` of another config; `changed` replaces parts of it."""
    field, option = declared(config)[name]
    return dataclasses.field(default=field.default, metadata={"option": dataclasses.replace(option, **changed)})


def declared(config: Any) -> dict[str, tuple[dataclasses.Field[Any], Option]]:
    """{name: (field, its declaration)} of a config or its class, in the order of the fields."""
    return {f.name: (f, f.metadata["option"]) for f in dataclasses.fields(config)}


def flag(name: str, option: Option) -> str:
    """The long flag of the field `name`: '--group-size'."""
    given = (f for f in option.flags if f.startswith("--"))
    return next(given, f"--{name.replace('_', '-')}").split("/")[0]


# ---------------------------------------------------------------------------------------------------------- validation


@dataclass(frozen=True)
class Wrong:
    """A value that is not allowed. rule: what is allowed, in words."""

    flag: str
    value: Any
    rule: str
    choice: bool

    def must_be(self) -> str:
        """The problem, in the words of commands that make models."""
        return f"{self.flag} {self.value}: must be {self.rule}"

    def out_of_range(self) -> str:
        """The problem, in the words of commands that measure and export."""
        if self.choice:
            return f"{self.flag} {self.value!r} is not known: choose {self.rule}"
        return f"{self.flag} {self.value} is out of range: {self.rule}"


def wrong(config: Any) -> Iterator[Wrong]:
    """Yield the values of `config` that its fields do not allow."""
    for name, (_, option) in declared(config).items():
        value = getattr(config, name)
        for item in value if isinstance(value, tuple) else () if value is None else (value,):
            if not option.allows(item):
                yield Wrong(flag(name, option), item, option.rule, bool(option.choices))


def check(config: Any, command: str, more: Iterable[str] = (), word: Callable[[Wrong], str] = Wrong.must_be) -> None:
    """Raise one UserError with all values that are not allowed, followed by the problems in `more`."""
    if problems := [*map(word, wrong(config)), *more]:
        raise UserError("; ".join(problems), f"see `llmc {command} --help`")


# ---------------------------------------------------------------------------------------------------------- conversion


def item_type(hint: Any) -> Any:
    """The type of the items of `tuple[X, ...]`; None for any other type."""
    return get_args(hint)[0] if get_origin(hint) is tuple else None


def fitting(hint: Any, value: Any) -> Any:
    """`value` converted to the declared type `hint`: text to a path, a path to text, one item or a list to a tuple.

    Other values do not change; the config checks them.
    """
    if (item := item_type(hint)) is not None:
        one = isinstance(value, str | Path) or not isinstance(value, Iterable)
        return () if value is None else tuple(fitting(item, v) for v in ((value,) if one else value))
    types = get_args(hint) or (hint,)
    if isinstance(value, str) and Path in types and str not in types:
        return Path(value)
    return str(value) if isinstance(value, Path) and str in types and Path not in types else value


def make(cls: type[Config], options: Mapping[str, Any]) -> Config:
    """A config from options by name, each converted to its declared type. Raises UserError if the config does."""
    hints = get_type_hints(cls)
    return cls(**{name: fitting(hints.get(name), value) for name, value in options.items()})


# ------------------------------------------------------------------------------------- options that many commands have


def threads(help: str = "Number of CPU threads.", **declared: Any) -> Any:
    return option(None, help=help, **{"group": RUN, "low": 1, "shown": "physical cores", **declared})


def out(help: str, shown: str | None = None, **declared: Any) -> Any:
    return option(None, help=help, flags=("--out", "-o"), shown=shown, **declared)


def dry_run() -> Any:
    return option(False, help="Print the plan and what it needs. Do nothing else.", group=RUN)


def targets() -> Any:
    return option(None, help="File that names the targets.", metavar="FILE", group=RUN,
                  shown="./targets.toml, or the one in ~/.config/llmc")
