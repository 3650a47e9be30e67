"""Gates of `llmc compare`: which pass, and what is no gate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from reports import config, quality, whole, write

from llmc.errors import GateFailedError, UserError
from llmc.evals.compare import gates
from llmc.evals.compare.run import compare


@pytest.mark.parametrize(("gate", "passes", "fails"), [
    ("max_ppl_increase", "30%", "10%"), ("max_kld", "0.2", "0.1"), ("min_top1", "70%", "95%"),
    ("min_decode_speedup", "2.9x", "3.5x"),
])
def test_gates(gate: str, passes: str, fails: str, two_reports: list[Path]) -> None:
    assert compare(config(two_reports, **{gate: passes}))["passed"]
    result = compare(config(two_reports, **{gate: fails}))
    assert not result["passed"]
    with pytest.raises(GateFailedError) as e:
        gates.enforce(result["gates"])
    option = "--" + gate.replace("_", "-")
    assert e.value.problem.count(f"{option} {fails}, measured") == len(result["gates"])
    assert e.value.exit_code == 1
    gates.enforce(compare(config(two_reports, **{gate: passes}))["gates"])


def test_a_gate_holds_on_every_text_and_for_every_candidate(tmp_path: Path) -> None:
    bad_second = whole("b", 250, 5, 0.05, 30.0)
    bad_second["quality"]["texts"][1] = quality(5, 0.4)["texts"][1]
    paths = write(tmp_path, whole("base", 1000, 1, 0.0, 10.0), whole("a", 250, 3, 0.05, 30.0), bad_second)
    missed = [g for g in compare(config(paths, max_kld="0.1"))["gates"] if not g["passed"]]
    assert [(g["artifact"], g["text"]) for g in missed] == [("b", "tales")]


@pytest.mark.parametrize(("gate", "written"), [
    ("max_ppl_increase", "5"), ("max_ppl_increase", "0.05x"), ("max_ppl_increase", "-5%"), ("max_kld", "0.1%"),
    ("max_kld", "nan"), ("max_kld", ""), ("min_top1", "0.8"), ("min_top1", "80 %"), ("min_decode_speedup", "2"),
    ("min_decode_speedup", "2x faster"),
])
def test_gates_are_read_strictly(gate: str, written: str, two_reports: list[Path]) -> None:
    with pytest.raises(UserError, match="is not a number") as e:
        compare(config(two_reports, **{gate: written}))
    assert e.value.exit_code == 2


def test_a_missing_speed_is_no_pass(two_reports: list[Path]) -> None:
    r = json.loads(two_reports[0].read_text())
    del r["speeds"]
    two_reports[0].write_text(json.dumps(r))
    with pytest.raises(UserError, match="--min-decode-speedup: the reports hold no such figure"):
        compare(config(two_reports, min_decode_speedup="2x"))
