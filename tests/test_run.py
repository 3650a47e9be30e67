"""`llmc run`: what is made once, what is made again, what a killed run leaves, and whether the page says what was found."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from killing import Command, holding

import llmc
from llmc.cli import run as command
from llmc.console import size
from llmc.errors import UserError
from llmc.evals.report.show import pm
from llmc.files import write_sealed
from llmc.formats.manifest import versions
from llmc.recipes.chain import load
from llmc.recipes.jobs import jobs_of, open_folder
from llmc.recipes.run import used

QUICK = "{calibration: text.txt, samples: 8, seq_len: 32, threads: 1, context: 32, chunks: 2}"
RECIPE = f"""\
about: some <i>steps</i>, on a tiny model
defaults: {QUICK}
steps:
  - export: {{of: base, name: full}}
  - transform: {{scaling: none, rotate: r2}}
  - quantize: {{method: rtn}}
  - heal: {{steps: 2, batch: 1, held_out: 2, sampled: 0, check_every: 1}}
  - export: {{name: small}}
  - eval
  - compare: {{max_kld: 100}}
"""


@pytest.fixture
def base(made: SimpleNamespace) -> Path:
    """The tiny model; the test's working folder has a calibration text."""
    tiny.write_text(Path("text.txt"), 40_000)
    folder: Path = made.base
    return folder


def write(text: str, name: str = "r.yaml") -> str:
    Path(name).write_text(text)
    return name


@pytest.fixture(scope="module")
def finished(made: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which SHORT was run once, for the tests to copy: evaluations take their time."""
    folder = tmp_path_factory.mktemp("finished")
    with contextlib.chdir(folder):
        tiny.write_text(Path("text.txt"), 40_000)
        llmc.run_recipe(write(SHORT), model=made.base, out="run")
    return folder


@pytest.fixture
def short(base: Path, finished: Path) -> dict[str, Any]:
    """SHORT was run in the test's folder: its report."""
    shutil.copytree(finished, ".", dirs_exist_ok=True)
    return dict(json.loads(Path("run/r.json").read_text()))


SHORT = f"defaults: {QUICK}\nsteps: [quantize: {{method: rtn}}, export, eval, compare: {{max_kld: 100}}]"


TINY = {"prune.drop": 1, "samples": 8, "seq_len": 64, "distill.steps": 4, "distill.check_every": 2, "distill.batch": 1,
        "distill.held_out": 2, "heal.steps": 2, "heal.batch": 1, "heal.held_out": 2, "context": 64, "chunks": 2, "sampled": 0,
        "bench.prompt": 8, "bench.generate": 2, "bench.warmup": 0, "threads": 1, "calibration": "text.txt",
        "compare.max_kld": 100}


def test_the_shipped_chain_of_everything_and_its_page(base: Path) -> None:
    """phone-prune-distill, as it comes, on a tiny model."""
    result = llmc.run_recipe("phone-prune-distill", model=base, out="run", set=TINY)
    assert result["passed"]
    assert len(result["ran"]) == len(result["steps"]) == 14
    by_name = {a["name"]: a for a in result["artifacts"]}
    assert list(by_name) == ["base", "base-f16", "prune", "distill", "quantize", "heal", "phone"]
    html, text = (Path(f"run/phone-prune-distill.{s}").read_text() for s in ("html", "md"))
    for name in ("base-f16", "prune", "distill", "quantize", "heal", "phone"):
        (path,) = Path("run").glob(f"eval-{name}-*/{name}.json")
        (measured,) = json.loads(path.read_text())["quality"]["texts"]
        for page in (html, text):  # the very figures of the reports, and nobody else's
            assert pm(measured["perplexity"], 2) in page
            assert pm(measured["kld"], 4) in page
        assert by_name[name]["report"]["quality"]["texts"][0]["kld"] == measured["kld"]
        assert size(by_name[name]["bytes"]) in html
    (speed,) = Path("run").glob("bench-*/phone.json")
    assert f"{json.loads(speed.read_text())['speeds']['local-cpu']['decode']['median']:.1f}" in html
    assert not re.search(r'(src|href)="https?:|<script', html), "the page needs nothing from anywhere"
    (link,) = re.findall(r'href="([^"]+)"', html)
    assert Path("run", link).is_file()
    passes = [p["name"] for p in by_name["phone"]["provenance"]["passes"]]
    assert passes == ["prune", "distill", "rotate", "scaling", "quantize", "heal", "export-gguf"]
    assert json.loads(Path("run/phone-prune-distill.json").read_text())["artifacts"] == result["artifacts"]
    for curve in ("<h2>Distillation</h2>", "<h2>Healing</h2>"):
        assert curve in html
    heal = next(s for s in result["steps"] if s["job"] == "heal")
    assert heal["teacher"] == "base"
    assert len(heal["curve"]["losses"]) == 2


def planned(text: str, base: Path, **settings: Any) -> list[str]:
    """The jobs that would be run."""
    plan = llmc.run_recipe(write(text), model=base, out="run", set=settings, dry_run=True)["plan"]
    return [r["job"] for r in plan if r["state"] != "cached"]


def test_another_device_of_the_same_name_is_measured_anew(base: Path) -> None:
    text = f"defaults: {QUICK}\nsteps: [quantize: {{method: rtn}}, export, bench: {{target: board, targets: t.toml}}]"

    def key(entry: str) -> str:
        Path("t.toml").write_text(f"[targets.board]\n{entry}")
        made = load(write(text), str(base), {})
        return jobs_of(made, Path("run"), open_folder(Path("run")))["bench"].key

    here = key('address = "ssh://one"')
    assert key('address = "ssh://one"') == here
    assert key('address = "ssh://two"') != here
    assert key('address = "ssh://one"\nfacts = {temperature_c = 50}') == here
    assert key('address = "ssh://one"\nfacts = {cpu = "Cortex-A76"}') != here


def test_nothing_is_made_twice_and_a_change_makes_what_depends_on_it(base: Path) -> None:
    text = RECIPE
    first = llmc.run_recipe(write(text), model=base, out="run")
    again = llmc.run_recipe(write(text), model=base, out="run")
    assert again["ran"] == []
    assert again["artifacts"] == first["artifacts"]
    page = Path("run/r.html").read_text()
    assert "<i>steps" not in page
    assert "some &lt;i&gt;steps" in page

    healed = ["heal", "small", "eval small", "compare"]
    assert planned(text, base, **{"heal.steps": 3}) == healed
    assert planned(text, base, **{"eval.chunks": 1})[0] == "eval full"
    assert planned(text, base, **{"transform.seed": 1})[0] == "transform"
    assert planned(text, base, **{"full.float_type": "f32"}) == ["full", "eval full", "compare"]
    assert planned(text, base, threads=2)[0] == "full"
    assert llmc.run_recipe("r.yaml", model=base, out="run", set={"compare.max_kld": "99"})["ran"] == ["compare"]
    assert planned(text, base) == [], "the first is still there"

    Path("text.txt").write_text(tiny.corpus()[1000:41_000])  # the same name and length, another text
    assert planned(text, base) == healed, "rotation and round-to-nearest read no text"


def test_moved_files_are_the_same_files(base: Path, short: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for name in ("run", "text.txt", "r.yaml"):
        Path(name).rename(folder / name)
    for p in folder.rglob("*"):
        if p.is_file():
            os.utime(p, (1, 1))
    assert llmc.run_recipe(folder / "r.yaml", model=base, out=folder / "run")["ran"] == []


def test_a_deleted_artifact_is_made_again_only_if_needed(base: Path, short: dict[str, Any]) -> None:
    shutil.rmtree(path_of(short, "quantize"))
    assert llmc.run_recipe("r.yaml", model=base, out="run")["ran"] == [], "all that was made of it is there"
    file = path_of(short, "export")
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    plan = llmc.run_recipe("r.yaml", model=base, out="run", dry_run=True)["plan"]
    assert {r["job"]: r["state"] for r in plan} == {"quantize": "run", "export": "run", "eval base": "cached",
                                                    "eval export": "cached", "compare": "cached"}
    assert "was changed" in next(r["why"] for r in plan if r["job"] == "export")
    assert llmc.run_recipe("r.yaml", model=base, out="run")["ran"] == ["quantize", "export"]
    assert file.read_bytes() == good


def path_of(report: dict[str, Any], name: str) -> Path:
    return Path(next(a["path"] for a in report["artifacts"] if a["name"] == name))


def test_a_file_of_another_length_is_not_read(base: Path, short: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It has another hash: 3 GB of zeros in place of a report cost a minute on a slow machine."""
    from llmc.recipes import identity
    from llmc.recipes.jobs import is_done

    job = jobs_of(load("r.yaml", model=str(base)), Path("run"), open_folder(Path("run")))["compare"]
    long = job.artifact
    assert is_done(job, open_folder(Path("run"))) == (True, "")
    with long.open("r+b") as f:
        f.truncate(1 << 33)
    monkeypatch.setattr(identity, "sha256", lambda path: pytest.fail(f"{path} was read"))
    assert is_done(job, open_folder(Path("run"))) == (False, f"{long.name} was changed since it was made")


def test_a_dry_run_leaves_nothing_and_knows_earlier_times(base: Path, finished: Path) -> None:
    write(SHORT)
    before = set(Path().iterdir())
    plan = llmc.run_recipe("r.yaml", model=base, out="run", dry_run=True)["plan"]
    assert [r["state"] for r in plan] == ["run"] * 5
    assert [r["seconds"] for r in plan] == [None] * 5, "nothing was measured here yet"
    assert plan[0]["memory_bytes"] > 0, "of quantize's own plan"
    assert set(Path().iterdir()) == before
    shutil.copytree(finished / ".llmc", ".llmc")
    later = llmc.run_recipe("r.yaml", model=base, out="run", dry_run=True)["plan"]
    assert all(r["seconds"] > 0 for r in later), "such steps were timed in this working folder"


def killed(base: Path, wait_for: str) -> None:
    """A run in a process of its own, killed with SIGKILL once `wait_for` is there."""
    Command("run", "r.yaml", "--model", base).kill(Path("run"), f"run/{wait_for}")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_kill_and_continue(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed while healing: what was finished stays, healing goes on, and the result is that of an uninterrupted run."""
    text = f"defaults: {QUICK}\nsteps: [quantize: {{method: rtn}}, heal: {{steps: 40, batch: 1, held_out: 2, sampled: 0, " \
           "check_every: 1, patience: 99}, export]"
    write(text)
    killed(base, "heal-*/.heal.unfinished/state*")
    assert (next(iter(Path("run").glob("quantize-*"))) / ".done.json").is_file()
    plan = llmc.run_recipe("r.yaml", model=base, out="run", dry_run=True)["plan"]
    assert {r["job"]: r["state"] for r in plan} == {"quantize": "cached", "heal": "resume", "export": "run"}
    went_on = llmc.run_recipe("r.yaml", model=base, out="run")
    assert went_on["ran"] == ["heal", "export"]
    whole = llmc.run_recipe("r.yaml", model=base, out="whole")
    files = [Path(next(a["path"] for a in r["artifacts"] if a["name"] == "export")) for r in (went_on, whole)]
    assert files[0].read_bytes() == files[1].read_bytes()
    steps = {s["job"]: s for s in went_on["steps"]}
    assert steps["heal"]["resumed"]
    assert len(steps["heal"]["curve"]["losses"]) == 40


def test_a_published_artifact_without_a_note_is_kept(base: Path, short: dict[str, Any]) -> None:
    """The kill comes between the artifact's rename and the note that it is done."""
    folder = path_of(short, "quantize").parent
    note = json.loads((folder / ".done.json").read_text())
    (folder / ".done.json").unlink()
    write_sealed(folder / ".started.json", {"key": note["key"], "versions": versions()})
    weights = folder / "quantize" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    shutil.rmtree(path_of(short, "export").parent)
    assert llmc.run_recipe("r.yaml", model=base, out="run")["ran"] == ["quantize", "export"]
    assert weights.stat().st_mtime_ns == before, "it was not made again"
    assert (folder / ".done.json").is_file()


def test_a_missed_gate_is_exit_code_1_every_time(base: Path, short: dict[str, Any],
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    args = ["run", "r.yaml", "--model", str(base), "-o", "run"]
    assert command([*args, "--set", "compare.max_kld=100"]) == 0
    for _ in range(2):
        assert command([*args, "--set", "compare.max_kld=0.000001"]) == 1
        out = capsys.readouterr()
        assert "MISSED" in out.out
        assert "1 of 1 gates missed" in out.err
    assert "nothing to do" in out.out
    assert "1 of 1 gates missed" in Path("run/r.html").read_text()
    assert not llmc.run_recipe("r.yaml", model=base, out="run", set={"compare.max_kld": "0.000001"})["passed"]


def test_a_step_that_fails_is_named_and_keeps_what_was_made(base: Path) -> None:
    write(f"defaults: {QUICK}\nsteps: [quantize: {{method: rtn}}, export: {{embedding: q4_k}}]")
    with pytest.raises(UserError, match=r"^step export: "):
        llmc.run_recipe("r.yaml", model=base, out="run")
    again = llmc.run_recipe("r.yaml", model=base, out="run", set=["export.embedding=q8_0"])
    assert again["ran"] == ["export"]


def test_folders_of_others_and_names_that_would_leave(base: Path) -> None:
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not the folder of a recipe run"):
        llmc.run_recipe(write(SHORT), model=base, out="mine")
    result = llmc.run_recipe(write("steps: [quantize: {method: rtn}]", ".. a b.yaml"), model=base)
    assert result["folder"] == "a-b"
    assert Path("a-b/a-b.html").is_file()


def test_two_runs_do_not_share_a_folder_at_once(base: Path) -> None:
    with used(Path("run")):
        pass
    with holding(Path("run"), inside=True) as other, pytest.raises(UserError, match="run is being written by ") as e:
        llmc.run_recipe(write(SHORT), model=base, out="run")
    assert f" {other.pid} " in e.value.problem
    assert llmc.run_recipe(write("steps: [quantize: {method: rtn}]"), model=base, out="run")["ran"] == ["quantize"]


def test_json_and_markdown(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["run", write("steps: [quantize: {method: rtn}]"), "--model", str(base), "-o", "run"]
    assert command([*args, "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert result["kind"] == "llmc-recipe-report"
    assert command([*args, "--markdown"]) == 0
    assert capsys.readouterr().out == Path("run/r.md").read_text() + "\n"


def test_an_unchanged_run_imports_nothing_heavy(base: Path, short: dict[str, Any]) -> None:
    code = (f"import sys, llmc; print(llmc.run_recipe('r.yaml', model={str(base)!r}, out='run')['ran'])\n"
            "print([m for m in ('torch', 'transformers', 'gguf', 'numpy') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n[]\n"
