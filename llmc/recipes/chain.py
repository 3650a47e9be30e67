"""Finds and checks the inputs of each step of a recipe. The kinds of artifacts in commands.py decide what is allowed."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmc.compress.prune.config import MASKS
from llmc.errors import UserError
from llmc.formats.artifacts.table import format_of
from llmc.formats.types import BLOCK_TYPES
from llmc.recipes.commands import ARTIFACTS, CALLED, EXPORTED, FLOAT, ONNX_TYPES, PAGE, QUANTIZED, REPORT
from llmc.recipes.recipe import BASE, EACH, Recipe, did_you_mean, override, parse, read_text, scalar
from llmc.recipes.typed import TypedStep, type_steps
from llmc.sources.resolve import HUB_ID, WHAT_TO_GIVE


@dataclass(frozen=True)
class Step:
    """A checked step. inputs: names of steps or 'base'.  teacher: a step, 'base' or the path of a model; None if it has none.
    kind: of its result.  reports: for compare, the eval and bench steps that measured each input, in the order of inputs."""

    typed: TypedStep
    inputs: tuple[str, ...]
    teacher: str | None
    kind: str
    reports: tuple[tuple[str, ...], ...] = ()

    @property
    def name(self) -> str:
        return self.typed.name

    @property
    def command(self) -> str:
        return self.typed.command.name


@dataclass(frozen=True)
class Chain:
    """A checked recipe. base: the model's path or hub id."""

    recipe: Recipe
    base: str
    steps: tuple[Step, ...]

    def step(self, name: str) -> Step:
        return next(s for s in self.steps if s.name == name)


def load(source: str | Path, model: str | Path | None = None, settings: dict[str, Any] | None = None,
         need_model: bool = True) -> Chain:
    """Read a recipe, apply `settings` ({'step.option': value}; text is parsed as YAML) and check everything.

    Raises UserError with all problems of the recipe at once. need_model False: a recipe without a model is checked as if
    it had a float model.
    """
    name, text, folder = read_text(source)
    problems: list[str] = []
    recipe = parse(name, text, folder, problems)
    values = {k: scalar(v) if isinstance(v, str) and k != "model" else v for k, v in (settings or {}).items()}
    recipe = override(recipe, values, problems)
    if model is not None:
        recipe = replace(recipe, model=str(model))
    typed = type_steps(recipe, problems)
    base, kind = _base(recipe, need_model, problems)
    steps = _Linker(recipe, kind, problems).link(typed)
    if found := sorted(dict.fromkeys(problems), key=_line_number):
        listed = "\n  ".join(found)
        raise UserError(f"the recipe {name} has {len(found)} problem{'s' * (len(found) > 1)}:\n  {listed}",
                        "nothing was read or run; `llmc COMMAND --help` lists the options")
    return Chain(recipe, base, tuple(steps))


def _line_number(problem: str) -> int:
    """The line number in a problem, to sort by; 0 if it has none."""
    found = re.match(r"line (\d+)", problem)
    return int(found[1]) if found else 0


def _base(recipe: Recipe, need_model: bool, problems: list[str]) -> tuple[str, str]:
    """The base model and its kind. A hub id counts as a float model until it is downloaded."""
    if not recipe.model:
        if need_model:
            problems.append("there is no model: give --model MODEL, or write `model:` into the recipe")
        return "", FLOAT
    base = recipe.path(recipe.model)
    path = Path(base)
    if path.exists():
        kind = format_of(path)
        if kind is None:
            problems.append(f"model {base}: {WHAT_TO_GIVE}")
            return str(path.absolute()), FLOAT
        if not kind.can_start:
            problems.append(f"model {base}: {kind.label} is made by export and cannot be the base")
            return base, FLOAT
        try:
            return str(path.absolute()), QUANTIZED if kind(path).starts_quantized() else FLOAT
        except UserError as e:
            problems.append(f"model: {e.problem}")
    elif HUB_ID.fullmatch(base) is None:
        problems.append(f"model: there is no folder or file {base}: {WHAT_TO_GIVE}")
    return base, FLOAT


class _Linker:
    """Visits the steps in order and records what they make."""

    def __init__(self, recipe: Recipe, base_kind: str, problems: list[str]) -> None:
        self.recipe, self.problems = recipe, problems
        self.kinds: dict[str, str | None] = {BASE: base_kind}  # None: the step has problems
        self.made: dict[str, Step] = {}
        self.newest = BASE

    def link(self, typed: list[TypedStep | None]) -> list[Step]:
        for raw, t in zip(self.recipe.steps, typed, strict=True):
            if t is None:
                self.kinds[raw.name] = None
                if raw.command not in ("export", "eval", "bench", "compare"):
                    self.newest = raw.name
                continue
            step = self._step(t)
            self.kinds[t.name] = t.gives
            self.made[t.name] = step
            if t.command.makes_model and t.gives not in EXPORTED:
                self.newest = t.name
        return list(self.made.values())

    def _step(self, t: TypedStep) -> Step:
        if t.gives == PAGE:
            return self._compare(t)
        if t.gives == REPORT:
            return Step(t, self._measured(t), None, REPORT)
        inputs = self._checked(t, t.of or (self.newest,), t.command.takes)
        if len(inputs) > 1:
            self._problem(t, "of", f"{t.command.name} works on one model, but `of` names {', '.join(inputs)}")
        if inputs[:1]:
            self._rules(t, inputs[0])
        return Step(t, inputs[:1], self._teacher(t, inputs[0] if inputs else BASE), t.gives)

    def _problem(self, t: TypedStep, option: str, message: str) -> None:
        where = t.raw.where(option if option in t.raw.options else None)
        self.problems.append(f"{where}: {message}")

    def _checked(self, t: TypedStep, names: tuple[str, ...], takes: tuple[str, ...]) -> tuple[str, ...]:
        """The names of existing inputs that the command can take. The others become problems."""
        good = []
        for name in names:
            kind = self.kinds.get(name)
            if name not in self.kinds:
                self._problem(t, "of", f"there is no earlier step {name!r}{did_you_mean(name, self.kinds)}")
            elif kind is not None and kind not in takes:
                what = CALLED.get(kind, "no model")
                need = " or ".join(CALLED[k] for k in takes)
                self._problem(t, "of", f"{t.command.name} takes {need}, but {name} is {what}{_remedy(t.command.name, kind)}")
            else:
                good.append(name)
        return tuple(good)

    def _teacher(self, t: TypedStep, student: str) -> str | None:
        """The teacher of heal and distill, by default the base. Healing by layer needs a teacher of the student's shape."""
        if t.command.name not in ("heal", "distill"):
            return None
        by_layer = t.command.name == "heal" and t.config.scope == "block"
        reshaped = by_layer and any(self._reshapes(n) for n in self._ancestry(student))
        if t.teacher is None:
            if reshaped:  # layers are compared in pairs: the model that was quantized has the same shape
                return next((n for n in self._ancestry(student) if self.kinds.get(n) == FLOAT), BASE)
            if self.kinds[BASE] == QUANTIZED:
                self._problem(t, "teacher", "the base is quantized itself: name a float teacher")
            return BASE
        if t.teacher not in self.kinds:
            path = self.recipe.path(t.teacher)
            if not Path(path).exists() and HUB_ID.fullmatch(path) is None:
                self._problem(t, "teacher", f"there is no earlier step and no model {path!r}{did_you_mean(path, self.kinds)}")
            return path
        if self.kinds[t.teacher] not in (FLOAT, None):
            self._problem(t, "teacher", f"the teacher must be a float model, but {t.teacher} is "
                                        f"{CALLED.get(str(self.kinds[t.teacher]), 'no model')}")
        elif reshaped and not any(self._reshapes(n) for n in self._ancestry(t.teacher)):
            self._problem(t, "teacher", f"{t.teacher} has another shape than the student: scope block "
                                        "compares layers in pairs")
        return t.teacher

    def _ancestry(self, name: str) -> list[str]:
        """A step and the steps that it was made from, newest first, without the base."""
        found = []
        while name in self.made:
            found.append(name)
            name = self.made[name].inputs[0] if self.made[name].inputs else BASE
        return found

    def _reshapes(self, name: str) -> bool:
        step = self.made[name]
        return step.command == "prune" and step.typed.config.method not in MASKS

    def _rules(self, t: TypedStep, source: str) -> None:
        """Rules that depend on more than the kinds of artifacts."""
        ancestry = self._ancestry(source)
        quantized = next((self.made[n] for n in ancestry if self.made[n].command == "quantize"), None)
        config = t.config
        if t.format == "onnx" and quantized:
            q = quantized.typed.config
            qtype = q.target or (q.preset or q.type)
            if qtype is not None and qtype not in ONNX_TYPES:
                self._problem(t, "of", f"ONNX Runtime cannot hold the type of {quantized.name} ({qtype}): use "
                                       f"--bits 4 or 8, or one of the types {', '.join(ONNX_TYPES)}")
            if config.dtype is not None:
                self._problem(t, "dtype", f"{source} is quantized, and its codes are copied: leave dtype out")
        masked = [n for n in ancestry if self.made[n].command == "prune" and not self._reshapes(n)]
        if masked and t.command.name == "transform" and config.rotate != "none":
            self._problem(t, "rotate", f"a rotation fills the zeros of {masked[0]}: rotate before pruning")
        if masked and t.command.name == "quantize" and config.type and not (
                config.lose_zeros or BLOCK_TYPES[config.type].holds_zero):
            self._problem(t, "type", f"{config.type} has no code for the zeros of {masked[0]}: take another type, or "
                                     "lose_zeros: true")

    # ---------------------------------------------------------------------------------------------- what is measured

    def _exports(self, of_base: bool) -> list[str]:
        """Exported artifacts so far: those made from the base itself if `of_base`, else the others."""
        return [n for n, s in self.made.items() if s.kind in EXPORTED and (s.inputs == (BASE,)) == of_base]

    def _measured(self, t: TypedStep) -> tuple[str, ...]:
        """The inputs of eval, bench and compare: the base (or its exports), then every export so far, or the newest model."""
        base = self._exports(of_base=True) or [BASE]
        if t.of == (EACH,):
            models = [n for n, s in self.made.items() if s.kind in ARTIFACTS and n not in base]
            return (*base, *models)
        if t.of is None:
            others = self._exports(of_base=False) or [self.newest] * (self.newest != BASE)
            return tuple(n for n in (*base, *others) if self.kinds.get(n) is not None)
        return self._checked(t, tuple(dict.fromkeys(t.of)), ARTIFACTS)

    def _compare(self, t: TypedStep) -> Step:
        """A compare step: the artifacts, those of the base first, and the newest measurements of each."""
        measurements = [s for s in self.made.values() if s.kind == REPORT]
        seen = list(dict.fromkeys(n for s in measurements for n in s.inputs))
        names = tuple(n for n in self._measured(t) if n in seen or t.of not in (None, (EACH,)))
        reports = []
        for name in names:
            newest = {s.command: s.name for s in measurements if name in s.inputs}
            reports.append(tuple(newest.values()))
            if not newest:
                self._problem(t, "of", f"{name} was not measured: put an eval or bench step before it")
        if not names and not any(k is None for k in self.kinds.values()):
            self._problem(t, "of", "there is nothing to compare: put an eval or bench step before it")
        of_eval = ("max_ppl_increase", "max_kld", "max_kld_p99", "max_kld_p999", "min_top1")
        for gate, needs in (*((name, "eval") for name in of_eval), ("min_decode_speedup", "bench")):
            lacking = [n for n, steps in zip(names, reports, strict=True)
                       if not any(self.made[s].command == needs for s in steps)]
            if getattr(t.config, gate) is not None and lacking and None not in self.kinds.values():
                self._problem(t, gate, f"{gate} needs {needs} of {', '.join(lacking)}: put a step `{needs}` before it")
        return Step(t, names, None, PAGE, tuple(reports))


def _remedy(command: str, kind: str) -> str:
    """Advice for an input of the wrong kind, as ': put a quantize step before it', or ''."""
    if command == "heal" and kind == FLOAT:
        return ": put a quantize step before it"
    if kind == QUANTIZED:
        return f": {command} comes before quantize"
    if kind in EXPORTED:
        return ": no step can start from an exported file; name the model with `of`"
    return ""
