"""`llmc sweep`: variants that share steps, the Pareto front, both executors."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny

import llmc
from llmc.cli import run as command
from llmc.errors import UserError
from llmc.recipes.schema import RunReport, SweepReport
from llmc.recipes.sweep import on_front, variations
from llmc.typed_dicts import differences

RECIPE = """\
defaults: {samples: 8, seq_len: 32, threads: 1, calibration: text.txt, context: 32, chunks: 2}
steps:
  - export: {of: base, name: full}
  - prune: {method: depth, drop: 0, by: influence}
  - quantize: {method: rtn}
  - export: {name: small}
  - eval
  - compare: {max_kld: 100}
"""


@pytest.fixture
def base(made: SimpleNamespace) -> Path:
    tiny.write_text(Path("text.txt"), 40_000)
    Path("r.yaml").write_text(RECIPE)
    folder: Path = made.base
    return folder


def kinds(labels: list[str]) -> dict[str, int]:
    """How many jobs of each step."""
    names = [label.rpartition("-")[0] for label in labels]
    return {n: names.count(n) for n in names}


def test_variants_share_steps(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = llmc.run_recipe("r.yaml", model=base, out="run", set={"quantize.type": "q8_0"})
    args = ["sweep", "r.yaml", "--vary", "quantize.type=q4_0,q8_0", "prune.drop=0,1", "--model", str(base), "-o", "run"]
    assert command([*args, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert len(plan["variants"]) == 4
    assert kinds([r["job"] for r in plan["plan"]]) == {"full": 1, "prune": 2, "quantize": 4, "small": 4, "eval-full": 1,
                                                       "eval-small": 4, "compare": 4}
    assert command([*args, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert differences(result, SweepReport) == []
    assert differences(json.loads(Path("run/r.json").read_text()), RunReport) == []
    assert kinds(result["ran"]) == {"prune": 1, "quantize": 3, "small": 3, "eval-small": 3, "compare": 3}, \
        "one variant is what `llmc run` made, and it is used again"
    points = {a["variant"]: a for a in result["artifacts"]}
    assert set(points) == {"every variant", *(f"quantize.type={g} prune.drop={d}" for g in ("q4_0", "q8_0") for d in (0, 1))}
    one = next(a for a in alone["artifacts"] if a["name"] == "small")
    same = points["quantize.type=q8_0 prune.drop=0"]
    assert (same["bytes"], same["kld"]) == (one["bytes"], one["report"]["quality"]["texts"][0]["kld"])
    page = Path("run/r-sweep.html").read_text()
    for a in result["artifacts"]:
        assert f"{a['kld']['value']:.4f}" in page
        assert a["front"] == on_front(a, result["artifacts"])
    assert command(args) == 0
    assert "0 steps were run" in capsys.readouterr().out
    assert command([*args, "--set", "compare.max_kld=0.01"]) == 1, "a gate is missed in some variants"


def test_front() -> None:
    """A worked example: (bytes, divergence, tokens/s); None is not measured."""
    def point(n: int, kld: float | None, speed: float | None = None) -> dict[str, Any]:
        return {"bytes": n, "kld": None if kld is None else {"value": kld}, "decode": speed}

    small, large, worse, equal = point(10, 0.5), point(20, 0.1), point(21, 0.2), point(20, 0.1)
    unmeasured, free = point(5, None), point(30, 0.0)
    points = [small, large, worse, equal, unmeasured, free]
    assert [on_front(p, points) for p in points] == [True, True, False, True, False, True]
    slow, fast = point(10, 0.1, 5.0), point(12, 0.2, 9.0)
    assert [on_front(p, [slow, fast]) for p in (slow, fast)] == [True, True], "larger and worse, but faster"


def test_all_variants_are_checked_first(base: Path) -> None:
    with pytest.raises(UserError) as e:
        llmc.sweep("r.yaml", vary={"quantize.type": ["q4_0", "q9"], "quantize.bitts": [4]}, model=base)
    assert "quantize.type=q9 quantize.bitts=4: " in e.value.problem
    assert "did you mean bits?" in e.value.problem
    assert "--type q9: must be one of" in e.value.problem
    assert not Path("r").exists()


@pytest.mark.parametrize("vary", ["quantize.type", "quantize.type=", "=q4_0"])
def test_what_is_no_variation(vary: str) -> None:
    with pytest.raises(UserError, match="write it like"):
        variations((vary,))


def test_too_many_nothing_and_twice(base: Path) -> None:
    with pytest.raises(UserError, match="nothing to vary"):
        llmc.sweep("r.yaml", model=base)
    with pytest.raises(UserError, match="1000 variants are more than"):
        llmc.sweep("r.yaml", vary={"prune.drop": range(1000)}, model=base)
    with pytest.raises(UserError, match="twice"):
        variations(("a.b=1", "a.b=2"))
    with pytest.raises(UserError, match="--executor dask"):
        llmc.sweep("r.yaml", vary=["prune.drop=0"], executor="dask", model=base)


NO_EVAL = RECIPE.split("  - eval")[0]


def test_what_a_steps_own_plan_refuses_is_said_before_anything_is_run(base: Path) -> None:
    Path("r.yaml").write_text(NO_EVAL)
    with pytest.raises(UserError) as e:
        llmc.sweep("r.yaml", vary={"prune.drop": [8, 9, 0]}, model=base, out="run")
    assert "--drop 8" in e.value.problem
    assert "--drop 9" in e.value.problem
    assert not list(Path("run").glob("*-*"))


def test_a_variant_that_fails_does_not_stop_the_others(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of 64 have no blocks of 256: that is seen when the file is written."""
    Path("r.yaml").write_text(NO_EVAL)
    args = ["sweep", "r.yaml", "--vary", "small.embedding=q4_k,q8_0", "--model", str(base), "-o", "run"]
    assert command(args) == 2
    assert "1 of 2 variants failed: small.embedding=q4_k" in capsys.readouterr().err
    assert len(list(Path("run").glob("small-*/small.gguf"))) == 1
    assert "256" in Path("run/r-sweep.md").read_text()


@pytest.fixture
def ray_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Ray of one core on this machine, whose workers do not stand behind everything else (Ray's default is nice 15)."""
    import ray

    monkeypatch.setenv("RAY_worker_niceness", "0")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    yield
    ray.shutdown()


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the package ray")
def test_on_ray(base: Path, ray_here: None) -> None:
    """The same file as in this process, and a failed step takes only its own variant with it."""
    Path("r.yaml").write_text(NO_EVAL)
    there = llmc.sweep("r.yaml", vary={"small.embedding": ["q8_0", "q4_k"]}, model=base, out="ray", executor="ray")
    here = llmc.sweep("r.yaml", vary={"small.embedding": ["q8_0"]}, model=base, out="here")
    files = [Path(next(a["path"] for a in r["artifacts"] if a["name"] == "small")) for r in (there, here)]
    assert files[0].name == files[1].name == "small.gguf"
    assert files[0].read_bytes() == files[1].read_bytes()
    assert [bool(v["failed"]) for v in there["variants"]] == [False, True]
