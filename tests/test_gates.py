"""Gates of `llmc compare`: which pass, and what is no gate."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from reports import config, quality, whole, write

from llmc.cli import run
from llmc.errors import GateFailedError, UserError
from llmc.evals.compare import gates
from llmc.evals.compare.run import compare
from llmc.evals.compare.ship import read_gates, ship
from llmc.evals.fit.show import describe
from llmc.evals.interval import around
from llmc.evals.quality import metrics
from llmc.evals.report.show import pm
from llmc.evals.report.store import hash_artifact
from llmc.runtimes.targets.kernels import write_layers


@pytest.mark.parametrize(("gate", "passes", "fails"), [
    ("max_ppl_increase", "30%", "10%"), ("max_kld", "0.2", "0.1"), ("min_top1", "70%", "95%"),
    ("max_kld_p99", "9", "0.1"), ("max_kld_p999", "9", "0.1"), ("min_decode_speedup", "2.9x", "3.5x"),
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


@pytest.mark.parametrize("gate", ["max_kld_p99", "max_kld_p999"])
def test_a_report_of_an_earlier_version_has_no_tails(gate: str, two_reports: list[Path]) -> None:
    r = json.loads(two_reports[1].read_text())
    for text in r["quality"]["texts"]:
        del text["kld"]["tails"]
    two_reports[1].write_text(json.dumps(r))
    assert compare(config(two_reports, max_kld="9"))["passed"]
    with pytest.raises(UserError, match=f"--{gate.replace('_', '-')}: the reports hold no such figure") as e:
        compare(config(two_reports, **{gate: "9"}))
    assert "measure it first" in e.value.hint


def test_a_missing_speed_is_no_pass(two_reports: list[Path]) -> None:
    r = json.loads(two_reports[0].read_text())
    del r["speeds"]
    two_reports[0].write_text(json.dumps(r))
    with pytest.raises(UserError, match="--min-decode-speedup: the reports hold no such figure"):
        compare(config(two_reports, min_decode_speedup="2x"))


@pytest.mark.parametrize(("gate", "limit", "answer"), [
    ("max_kld", 1.05, "maybe"), ("max_kld", 1.2, "yes"), ("max_kld", 0.8, "no"), ("min_top1", 0.97, "maybe"),
    ("min_top1", 0.9, "yes"), ("min_top1", 1.2, "no"),
])
def test_a_limit_inside_the_interval_is_not_decided(gate: str, limit: float, answer: str, tmp_path: Path,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    """compare and ship decide alike: an interval of two standard errors, and exit code 1 unless the answer is yes."""
    write_layers(tmp_path / "small.gguf", "Q4_0", 2, 128, 256)
    report = whole("small.gguf", 1, 5, 0.2, 30.0)
    report["artifact"] |= {"path": str(tmp_path / "small.gguf"), "sha256": hash_artifact(tmp_path / "small.gguf")}
    key = gate[4:]
    for text in report["quality"]["texts"]:
        text[key] |= {"value": 1.0, "se": 0.04}  # 0.92 to 1.08
    paths = write(tmp_path, whole("base", 1000_000, 1, 0.0, 10.0), report)
    written = f"{limit * 100}%" if gate == "min_top1" else str(limit)
    found = compare(config(paths, **{gate: written}))["gates"]
    assert {g["answer"] for g in found} == {answer}
    assert {g["passed"] for g in found} == {answer == "yes"}
    (tmp_path / "gates.yaml").write_text(yaml.safe_dump({
        "artifacts": ["small.gguf"], "reports": ["0.json", "1.json"],
        "targets": {"pi5": {gate: written if gate == "min_top1" else limit}}}))
    shipped = ship(read_gates(tmp_path / "gates.yaml"))["artifacts"][0]["results"]
    assert [(r["answer"], r["passed"]) for r in shipped] == [(answer, answer == "yes")]
    code = 0 if answer == "yes" else 1
    for command in (["compare", *map(str, paths), f"--{gate.replace('_', '-')}", written, "--page", str(tmp_path / "p.html")],
                    ["ship", str(tmp_path / "gates.yaml"), "-o", str(tmp_path / "s")]):
        assert run(command) == code
        out = capsys.readouterr()
        assert (("NOT DECIDED" in out.out) or ("MISSED" in out.out)) == (answer != "yes")
        assert ("NOT DECIDED" in out.out) == (answer == "maybe")
    if answer == "maybe":
        assert "not decided</p>" in (tmp_path / "p.html").read_text()


def test_an_unstable_speed_is_not_decided(two_reports: list[Path]) -> None:
    r = json.loads(two_reports[1].read_text())
    r["speeds"]["local-cpu"]["unstable"] = ["decode drifts by 30%"]
    two_reports[1].write_text(json.dumps(r))
    found = compare(config(two_reports, min_decode_speedup="2x"))["gates"]
    assert {(g["answer"], g["passed"]) for g in found} == {("maybe", False)}


def test_a_divergence_is_never_below_zero() -> None:
    """Equal logits up to rounding: float32 leaves sums a little below zero."""
    rng = np.random.default_rng(0)
    base = (rng.normal(size=(200, 3000)) * 5).astype(np.float32)
    other = base + np.float32(1e-7) * rng.normal(size=base.shape).astype(np.float32)
    kld, _ = metrics.divergence(base, other)
    assert kld.min() == 0
    assert metrics.mean(kld[None])["value"] < 1e-6
    assert pm({"value": -1e-9, "se": 0.0}, 4) == "0.0000 ± 0.0000"
    assert describe({"mid": -1e-9, "source": "measured", "note": ""}, "kld") == "0.0000"
    assert around({"value": -1e-9, "se": 1e-9}, least=0.0) == (0.0, 0.0, 1e-9)
