"""Recipes as they are read: every problem at once and where it is, names, overrides, chains by kinds. Nothing is run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmc.cli import run as command
from llmc.errors import UserError
from llmc.recipes.chain import Chain, load
from llmc.recipes.commands import COMMANDS, options
from llmc.recipes.recipe import shipped
from llmc.small_files import MEGABYTE


def recipe(text: str, name: str = "r.yaml") -> str:
    Path(name).write_text(text)
    return name


def chain(text: str, **settings: object) -> Chain:
    return load(recipe(text), settings=settings or None, need_model=False)


def problems(text: str, **settings: object) -> list[str]:
    with pytest.raises(UserError) as e:
        load(recipe(text), settings=settings or None, need_model=False)
    return [line.strip() for line in e.value.problem.splitlines()[1:]]


def test_every_problem_at_once_with_its_line() -> None:
    found = problems("""\
abuot: a slip
steps:
  - quantize: {bits: 5, samples: many, typee: q4_0}
  - heal
  - heal: {steps: 0, of: nobody}
  - export: papyrus
  - frobnicate
  - export: {name: ../../etc/passwd}
  - bench: {repetitions: 2}
  - compare: {max_kld: 5%}
  - {prune: {}, quantize: {}}
""")
    expected = ["line 1: 'abuot' is not known", "line 3, quantize: quantize has no option 'typee' (did you mean type?)",
                "line 3, quantize: samples 'many': must be a valid integer", "line 3, quantize: --bits 5: must be 4 or 8",
                "line 5, heal-2: --steps 0: must be at least 1", "line 6, export: format 'papyrus': must be gguf or onnx",
                "line 7: 'frobnicate' is not a step", "line 8: the name '../../etc/passwd' is not allowed",
                "line 9, bench: --repetitions 2 is out of range", "line 10, compare: --max-kld '5%' is not a number",
                "line 11: a step is one command"]
    assert [any(f.startswith(e) for f in found) for e in expected] == [True] * len(expected), found
    assert len(found) == len(expected)


@pytest.mark.parametrize(("steps", "problem"), [
    (["heal"], "line 2, heal: heal takes a quantized model, but base is a float model: put a quantize step before it"),
    (["quantize", "prune"], "line 3, prune: prune takes a float model, but quantize is a quantized model: prune comes before "
                            "quantize"),
    (["quantize", "quantize"], "line 3, quantize-2: quantize takes a float model"),
    (["export", "quantize: {of: export}"], "line 3, quantize: quantize takes a float model, but export is a .gguf file"),
    (["quantize: {type: q4_k}", "export: onnx"], "line 3, export: ONNX Runtime cannot hold the type of quantize "
                                                 "(q4_k)"),
    (["quantize: {target_size: 90MB}", "export: onnx"], "line 3, export: ONNX Runtime cannot hold the type of quantize"),
    (["quantize", "export: {format: onnx, dtype: fp16}"], "line 3, export: quantize is quantized, and its codes are copied: "
                                                          "leave dtype out"),
    (["export: {dtype: w8a8}"], "line 2, export: export has no option 'dtype'"),
    (["prune: wanda", "transform: {rotate: r2}"], "line 3, transform: a rotation fills the zeros of prune"),
    (["prune: wanda", "quantize: q4_1"], "line 3, quantize: q4_1 has no code for the zeros of prune"),
    (["prune: {method: depth, drop: 1}", "quantize", "heal: {teacher: base, scope: block}"],
     "line 4, heal: base has another shape than the student"),
    (["quantize", "heal: {teacher: quantize}"], "line 3, heal: the teacher must be a float model"),
    (["quantize: {teacher: base}"], "line 2, quantize: quantize takes no teacher"),
    (["compare"], "line 2, compare: there is nothing to compare"),
    (["eval", "compare: {min_decode_speedup: 2x}"], "line 3, compare: min_decode_speedup needs bench of base"),
    (["bench", "compare: {max_kld: 1}"], "line 3, compare: max_kld needs eval of base"),
    (["eval: {of: quantize}", "quantize"], "line 2, eval: there is no earlier step 'quantize'"),
    (["eval: {name: base}"], "line 2: the name 'base' is not allowed"),
    (["quantize: {name: a}", "export: {name: a}"], "line 3: a is the name of an earlier step"),
    (["quantize: {bits: 4, bits: 8}"], "line 2, quantize: bits is given twice"),
    (["quantize: {calibration: nowhere.txt}"], "line 2, quantize: calibration: there is no file nowhere.txt"),
    (["quantize: {imatrix: nowhere.gguf, method: rtn}"], "line 2, quantize: imatrix: there is no file nowhere.gguf"),
    (["quantize: {samples: true}"], "line 2, quantize: samples true: it is not a true/false option"),
    (["quantize: {out: elsewhere}"], "line 2, quantize: quantize has no option 'out'"),
    (["eval: python-docs"], "line 2: write eval's options by name"),
    (["quantize: {bits: !!python/object:os.system 4}"], "line 2"),
])
def test_illegal(steps: list[str], problem: str) -> None:
    found = problems("steps:\n" + "".join(f"  - {s}\n" for s in steps))
    assert any(f.startswith(problem) for f in found), found


@pytest.mark.parametrize("text", ["", "- quantize", "steps: 4", "steps: []", "just words", "steps:\n  - [quantize]"])
def test_what_is_no_recipe(text: str) -> None:
    with pytest.raises(UserError, match=r"not a recipe|there are none|a step is one command"):
        chain(text)


def test_not_yaml_names_the_line() -> None:
    with pytest.raises(UserError, match="not valid YAML: line 3"):
        chain("steps:\n  - quantize\n  - {")


def test_a_huge_file_is_not_read() -> None:
    Path("big.yaml").write_bytes(b"#" * (MEGABYTE + 1))
    with pytest.raises(UserError, match=r"big\.yaml is larger than 1 MB"):
        load("big.yaml")


def test_defaults_reach_the_steps_that_have_them() -> None:
    Path("text.txt").write_text("words")
    made = chain("defaults: {calibration: text.txt, threads: 2, context: 64}\n"
                 "steps: [quantize, heal: {threads: 1}, export, eval, compare]")
    configs = {s.name: s.typed.config for s in made.steps}
    assert configs["quantize"].calibration == str(Path("text.txt").absolute())
    assert configs["heal"].calibration == (str(Path("text.txt").absolute()),)
    assert [configs[n].threads for n in ("quantize", "heal", "export")] == [2, 1, 2]
    assert configs["eval"].context == 64
    assert problems("defaults: {calibratoin: self}\nsteps: [quantize]") == [
        "defaults: no step has an option 'calibratoin' (did you mean calibration?)"]


def test_paths_are_found_beside_the_recipe(tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "text.txt").write_text("words")
    file = recipe("steps: [quantize: {calibration: text.txt}]", str(folder / "r.yaml"))
    config = load(file, need_model=False).steps[0].typed.config
    assert config.calibration == str(folder / "text.txt")


def test_settings_override_and_are_checked_like_the_rest() -> None:
    text = "steps: [quantize, export, eval, compare: {max_kld: 0.1}]"
    settings = {"quantize.bits": "8", "compare.max_kld": "0.5", "eval.chunks": 3}
    made = chain(text, **settings)
    assert made.step("quantize").typed.config.bits == 8
    assert made.step("compare").typed.config.max_kld == "0.5"
    assert made.step("eval").typed.config.chunks == 3
    found = problems(text, **{"quantise.bits": "8", "quantize.bits": "3"})
    assert found[0].startswith("--set quantise.bits: there is no step 'quantise'")
    assert found[0].endswith("(did you mean quantize?)")
    assert "line 1, quantize: --bits 3: must be 4 or 8" in found


def test_what_steps_work_on() -> None:
    made = chain("""\
steps:
  - export: {of: base, name: full}
  - prune: {method: depth, drop: 1}
  - transform: {scaling: none, rotate: r2}
  - quantize
  - heal
  - export: {name: small}
  - export: {name: unhealed, of: quantize}
  - eval: {name: every, of: each}
  - eval
  - bench: {of: [small, full]}
  - compare
""")
    inputs = {s.name: s.inputs for s in made.steps}
    assert inputs["quantize"] == ("transform",)
    assert inputs["small"] == ("heal",)
    assert inputs["unhealed"] == ("quantize",)
    assert inputs["every"] == ("full", "prune", "transform", "quantize", "heal", "small", "unhealed")
    assert inputs["eval"] == inputs["compare"] == ("full", "small", "unhealed"), "the base's own export stands for the base"
    assert inputs["bench"] == ("small", "full")
    assert made.step("heal").teacher == "base"
    assert made.step("compare").reports == (("eval", "bench"), ("eval", "bench"), ("eval",))


def test_the_teacher_is_the_base_where_shapes_allow() -> None:
    pruned = "prune: {method: depth, drop: 1}"
    assert chain(f"steps: [{pruned}, quantize, heal]").step("heal").teacher == "base"
    assert chain(f"steps: [{pruned}, quantize, heal: {{scope: block}}]").step("heal").teacher == "prune"
    assert chain("steps: [prune: wanda, quantize, heal]").step("heal").teacher == "base"
    assert chain("steps: [transform, quantize, heal: {teacher: transform}]").step("heal").teacher == "transform"


def test_without_an_export_the_newest_model_is_measured() -> None:
    assert chain("steps: [quantize, heal, eval]").step("eval").inputs == ("base", "heal")
    assert chain("steps: [eval]").step("eval").inputs == ("base",)


def test_the_model_is_checked_with_the_rest(made: SimpleNamespace) -> None:
    with pytest.raises(UserError) as e:
        load(recipe("steps: [quantize: {bits: 3}]"))
    assert "there is no model" in e.value.problem
    assert "--bits 3" in e.value.problem
    with pytest.raises(UserError, match="there is no folder or file nowhere-at-all"):
        load(recipe("model: nowhere-at-all\nsteps: [quantize]"))
    with pytest.raises(UserError, match="quantize takes a float model, but base is a quantized model"):
        load(recipe("steps: [quantize]"), made.gptq)
    assert load(recipe("steps: [export]"), made.gptq).step("export").inputs == ("base",)
    with pytest.raises(UserError, match="the base is quantized itself: name a float teacher"):
        load(recipe("steps: [heal]"), made.gptq)


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_is_legal(name: str) -> None:
    made = load(name, need_model=False)
    assert made.recipe.about
    assert {s.kind for s in made.steps} >= {"gguf", "report", "page"}


def test_the_shipped_recipes_are_those_that_are_promised() -> None:
    assert shipped() == ["edge-2bit", "edge-4bit", "int8-safe", "onnx-and-gguf", "phone-prune-distill"]


def test_every_command_has_its_options_from_its_config() -> None:
    for c in COMMANDS.values():
        for format in c.configs:
            names = set(options(c.name, format))
            assert names
            assert not names & {"out", "resume", "dry_run", "model", "artifact", "of", "name"}


def test_ls_show_cp_validate(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["recipe", "ls", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["recipes"]) == set(shipped())
    assert command(["recipe", "show", "edge-4bit"]) == 0
    text = capsys.readouterr().out
    assert command(["recipe", "cp", "edge-4bit", "mine.yaml"]) == 0
    assert Path("mine.yaml").read_text() == text
    assert command(["recipe", "cp", "edge-4bit", "mine.yaml"]) == 2, "nothing is overwritten"
    assert command(["recipe", "cp", "../edge-4bit", "other.yaml"]) == 2
    assert not Path("other.yaml").exists()
    assert command(["recipe", "validate", "mine.yaml"]) == 0
    assert command(["recipe", "validate", "mine.yaml", "--set", "quantize.bits=5"]) == 2
    assert "--bits 5: must be 4 or 8" in capsys.readouterr().err


def test_a_recipe_is_checked_without_anything_heavy() -> None:
    recipe("steps: [quantize, heal, export, eval, bench, compare]")
    code = ("import sys; from llmc.recipes.chain import load; load('r.yaml', need_model=False)\n"
            "print([m for m in ('torch', 'transformers', 'numpy', 'gguf') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
