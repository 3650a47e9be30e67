"""Options are declared once: the fields of a config are its command's options, with help, and bad values are named."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from llmc.cli import app, run
from llmc.cli.options import add, help_text, parameters
from llmc.compress.distill.config import DistillConfig
from llmc.compress.heal.config import HealConfig
from llmc.compress.imatrix.config import ImatrixConfig
from llmc.compress.prune.config import PruneConfig
from llmc.compress.quantize.config import QuantizeConfig
from llmc.compress.transform.config import TransformConfig
from llmc.errors import UserError
from llmc.evals.bench.config import BenchConfig
from llmc.evals.compare.config import CompareConfig
from llmc.evals.fit.config import FitConfig
from llmc.evals.quality.config import EvalConfig
from llmc.export.gguf.config import GgufExportConfig
from llmc.export.onnx.config import OnnxExportConfig
from llmc.options import (
    ADVANCED,
    CALIBRATION,
    MAIN,
    RUN,
    Option,
    Wrong,
    check,
    declared,
    fitting,
    flag,
    like,
    make,
    option,
)
from llmc.recipes.config import RunConfig, SweepConfig
from llmc.runtimes.config import GenerateConfig

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
CONFIGS: dict[str, tuple[type, ...]] = {
    "quantize": (QuantizeConfig,), "imatrix": (ImatrixConfig,), "prune": (PruneConfig,), "transform": (TransformConfig,),
    "heal": (HealConfig,), "distill": (DistillConfig,), "export": (GgufExportConfig, OnnxExportConfig), "eval": (EvalConfig,),
    "bench": (BenchConfig,), "compare": (CompareConfig,), "fit": (FitConfig,), "generate": (GenerateConfig,),
    "run": (RunConfig,), "sweep": (SweepConfig,),
}
CLASSES = sorted({config for configs in CONFIGS.values() for config in configs}, key=lambda c: c.__name__)
OWN = {"json", "markdown", "help", "format", "validate", "profiles"}  # what commands have beside their configs


@dataclass(frozen=True, kw_only=True)
class Paint:
    coats: int = option(2, help="Number of coats.", low=1)
    share: float = option(0.5, help="Share of water.", above=0, below=1, group=ADVANCED)
    colour: str = option("red", help="Colour.", choices=("red", "blue"))
    sizes: tuple[int, ...] = option((4,), help="Sizes of brushes.", low=1, high=9, metavar="N")
    file: Path | None = option(None, help="File to write.", flags=("--out", "-o"))
    names: tuple[str, ...] = option((), help="Names.")

    def __post_init__(self) -> None:
        check(self, "paint", ["--coats and --colour do not agree"] if self.coats == 7 else [])


# ---------------------------------------------------------------------------------------------------------- declaration


@pytest.mark.parametrize("config", CLASSES)
def test_every_field_is_declared_with_help(config: type) -> None:
    assert is_dataclass(config)
    for field in fields(config):
        found = field.metadata["option"]
        assert found.help.endswith("."), field.name
        assert "…" not in found.help
        assert "\n" not in found.help
        if found.choices and field.default is not MISSING:
            assert field.default is None or field.default in found.choices, field.name


def test_options_cannot_be_passed_by_position() -> None:
    for config in CLASSES:
        positional = [f.name for f in fields(config) if not f.kw_only]
        assert len(positional) <= 2, positional
        assert not {f.type for f in fields(config) if not f.kw_only} & {"int", "float", "float | None", "int | None"}


@pytest.mark.parametrize(("declared", "rule"), [
    ({"choices": (4, 8)}, "4 or 8"), ({"choices": ("a", "b", "c")}, "a, b or c"), ({"choices": ("a",)}, "a"),
    ({"choices": tuple("abcde")}, "one of a, b, c, d, e"), ({"low": 1}, "at least 1"), ({"above": 0}, "above 0"),
    ({"low": 0, "high": 1}, "0 to 1"), ({"above": 0, "below": 1}, "between 0 and 1"),
    ({"above": 0, "high": 1}, "above 0 and at most 1"), ({}, ""),
])
def test_rules_in_words(declared: dict[str, Any], rule: str) -> None:
    assert Option("Help.", **declared).rule == rule


@pytest.mark.parametrize(("declared", "allowed", "not_allowed"), [
    ({"choices": (4, 8)}, [4, 8], [5, "4"]), ({"low": 1, "high": 3}, [1, 3], [0, 4]),
    ({"above": 0, "below": 1}, [0.5], [0, 1, float("nan")]), ({"low": 0}, [0], [-1, float("nan")]),
])
def test_what_is_allowed(declared: dict[str, Any], allowed: list[Any], not_allowed: list[Any]) -> None:
    found = Option("Help.", **declared)
    assert all(found.allows(v) for v in allowed)
    assert not any(found.allows(v) for v in not_allowed)


def test_all_problems_at_once_in_order() -> None:
    with pytest.raises(UserError) as error:
        Paint(coats=0, share=1.0, colour="green", sizes=(3, 12))
    assert error.value.problem.split("; ") == ["--coats 0: must be at least 1", "--share 1.0: must be between 0 and 1",
                                               "--colour green: must be red or blue", "--sizes 12: must be 1 to 9"]
    assert error.value.hint == "see `llmc paint --help`"
    with pytest.raises(UserError, match=r"^--colour green: must be red or blue; --coats and --colour do not agree"):
        Paint(coats=7, colour="green")
    Paint(sizes=(1, 9), file=None)


def test_the_other_wording() -> None:
    assert Wrong("--kv", "q4", "f16 or q8_0", True).out_of_range() == "--kv 'q4' is not known: choose f16 or q8_0"
    assert Wrong("--chunks", -1, "at least 0", False).out_of_range() == "--chunks -1 is out of range: at least 0"


def test_a_field_like_another() -> None:
    @dataclass
    class Varnish:
        coats: int = like(Paint, "coats", help="Number of layers.")

    assert Varnish().coats == 2
    assert declared(Varnish)["coats"][1] == Option("Number of layers.", low=1)
    assert declared(Paint)["coats"][1].help == "Number of coats."


# ----------------------------------------------------------------------------------------------------------- conversion


@pytest.mark.parametrize(("hint", "value", "fits"), [
    (Path, "a", Path("a")), (Path | None, "a", Path("a")), (Path | None, None, None), (str, Path("a"), "a"),
    (str | None, Path("a"), "a"), (Path | str | None, "a", "a"), (Path | str | None, Path("a"), Path("a")), (int, "4", "4"),
    (tuple[str, ...], "ab", ("ab",)), (tuple[str, ...], Path("a"), ("a",)), (tuple[Path, ...], ["a", Path("b")],
                                                                            (Path("a"), Path("b"))),
    (tuple[int, ...], 8, (8,)), (tuple[int, ...], range(2), (0, 1)), (tuple[str, ...], None, ()), (bool, True, True),
])
def test_values_take_the_declared_type(hint: Any, value: Any, fits: Any) -> None:
    found = fitting(hint, value)
    assert found == fits
    assert type(found) is type(fits)


def test_a_config_from_loose_values() -> None:
    assert make(Paint, {"file": "x", "names": "a", "sizes": [1, 2]}) == Paint(file=Path("x"), names=("a",), sizes=(1, 2))
    with pytest.raises(TypeError, match="coat"):
        make(Paint, {"coat": 1})


# --------------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize("command", CONFIGS)
def test_a_commands_options_are_its_configs(command: str) -> None:
    want = {flag(name, o): o for c in CONFIGS[command] for name, (_, o) in declared(c).items() if not o.argument}
    params = {p.opts[0] if p.opts[0].startswith("--") else p.opts[-1]: p for p in COMMANDS[command].params
              if p.param_type_name == "option"}
    assert set(params) - {f"--{o}" for o in OWN} == set(want)
    for name, o in want.items():
        assert params[name].help == help_text(o)
        assert params[name].rich_help_panel == o.group
        assert all(f in [*params[name].opts, *params[name].secondary_opts] for f in "/".join(o.flags).split("/") if f)


@pytest.mark.parametrize("command", CONFIGS)
def test_shared_fields_of_two_configs_are_declared_alike(command: str) -> None:
    first, *others = (declared(c) for c in CONFIGS[command])
    for other in others:
        for name in first.keys() & other.keys():
            assert first[name][1] == other[name][1]
            assert first[name][0].default == other[name][0].default


def test_parameters_have_types_defaults_and_flags() -> None:
    found = parameters(Paint)
    kinds = {name: p.annotation.__origin__ for name, p in found.items()}
    assert kinds == {"coats": int, "share": float, "colour": str, "sizes": str | None, "file": Path | None,
                     "names": list[str]}
    assert {n: p.default for n, p in found.items()} == {"coats": 2, "share": 0.5, "colour": "red", "sizes": "4", "file": None,
                                                        "names": []}
    assert all(p.kind is p.KEYWORD_ONLY for p in found.values())
    info = found["file"].annotation.__metadata__[0]
    assert (info.default, *info.param_decls) == ("--out", "-o")


def test_a_hidden_option_works_and_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Secret:
        plain: int = option(1, help="Shown.")
        secret: int = option(2, help="Not shown.", hidden=True)

    def tell(config: Any) -> None:
        print(config)

    own = typer.Typer(rich_markup_mode=None)
    add(own, tell, Secret)
    own(["--secret", "3"], standalone_mode=False)
    assert capsys.readouterr().out.strip().endswith("Secret(plain=1, secret=3)")
    own(["--help"], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "--plain" in shown
    assert "--secret" not in shown


def test_help_names_what_is_allowed_once() -> None:
    assert help_text(Option("Bits.", choices=(4, 8))) == "Bits. Allowed: 4 or 8."
    assert help_text(Option("red is warm. blue is cold.", choices=("red", "blue"))) == "red is warm. blue is cold."
    assert help_text(Option("a is first.", choices=("a", "a+b"))) == "a is first. Allowed: a or a+b."
    assert help_text(Option("Type.", choices=tuple("abcde"))) == "Type. Allowed: a, b, c, d, e."


def groups(command: str, capsys: pytest.CaptureFixture[str]) -> dict[str, list[str]]:
    """The long flags of each group of a command's --help, in order."""
    assert run([command, "--help"]) == 0
    found: dict[str, list[str]] = {}
    for line in capsys.readouterr().out.splitlines():
        if heading := re.fullmatch(r"(\w+):", line):
            found[heading[1]] = []
        elif found and (name := re.match(r"  (?:-\w, )?(--[\w-]+)", line)):
            list(found.values())[-1].append(name[1])
    return found


def test_quantize_shows_the_main_options_first(capsys: pytest.CaptureFixture[str]) -> None:
    found = groups("quantize", capsys)
    assert list(found) == ["Arguments", MAIN, CALIBRATION, ADVANCED, RUN]
    assert found[MAIN] == ["--bits", "--goal", "--type", "--preset", "--target-size", "--calibration", "--out"]
    assert found[RUN] == ["--device", "--threads", "--resume", "--dry-run", "--json", "--help"]


def test_export_groups_options_by_format(capsys: pytest.CaptureFixture[str]) -> None:
    found = groups("export", capsys)
    assert list(found) == ["Arguments", MAIN, "GGUF", "ONNX", RUN]
    assert found[MAIN][0] == "--format"


BAD = {  # one bad value of each kind
    "choice of numbers": ("quantize m --bits 5", "--bits 5: must be 4 or 8"),
    "choice of words": ("quantize m --method guess", "--method guess: must be gptq or rtn"),
    "count": ("imatrix m --samples 0", "--samples 0: must be at least 1"),
    "range": ("distill m --teacher t --seq-len 8", "--seq-len 8: must be 16 to 32768"),
    "share": ("prune m --sparsity 1", "--sparsity 1.0: must be between 0 and 1"),
    "closed share": ("transform m --alpha -1", "--alpha -1.0: must be 0 to 1"),
    "positive": ("distill m --teacher t --clip 0", "--clip 0.0: must be above 0"),
    "threads": ("heal m --teacher t --threads 0", "--threads 0: must be at least 1"),
    "item of a list": ("bench m --prompt 4,0", "--prompt 0 is out of range: at least 1"),
    "choice in a measurement": ("eval m --kv q4_0", "--kv 'q4_0' is not known: choose f16 or q8_0"),
    "range in a measurement": ("generate m hello --temperature 11", "--temperature 11.0 is out of range: 0 to 10"),
    "choice of an export": ("export m --float-type q9", "--float-type 'q9' is not known: choose f32, f16, bf16 or q8_0"),
    "two at once": ("eval m --context 4 --chunks -1", "--context 4 is out of range: at least 8; --chunks -1 is out of"),
    "between options": ("quantize m --type q4_k --preset q4_k_m", "give one of them"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_value_is_one_clear_message(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    line, problem = BAD[case]
    assert run(line.split()) == 2
    out = capsys.readouterr()
    assert out.out == ""
    first, second = out.err.splitlines()
    assert first.startswith("error: --")
    assert problem in first
    assert second.startswith("next: ")


@pytest.mark.parametrize("line", ["quantize m --bits four", "distill m --teacher t --lr fast", "bench m --warmup 1.5"])
def test_a_value_of_the_wrong_type_is_a_usage_error(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(line.split()) == 2
    assert line.split()[-2] in capsys.readouterr().err


def test_declaring_imports_nothing_heavy() -> None:
    modules = ", ".join(sorted({c.__module__ for c in CLASSES}))
    code = (f"import sys, llmc.options, {modules}\n"
            "print([m for m in ('torch', 'transformers', 'numpy', 'onnxruntime', 'jinja2', 'pydantic', 'typer', 'gguf') "
            "if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
