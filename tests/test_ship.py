"""llmc ship: only measured figures pass, of the very file that ships; what is missing, changed or estimated does not."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from reports import speed, whole, write

from llmc.cli import run
from llmc.errors import UserError
from llmc.evals.compare.schema import Shipping
from llmc.evals.compare.ship import read_gates, ship
from llmc.evals.compare.ship_show import summary
from llmc.evals.report.store import hash_artifact
from llmc.runtimes.targets.kernels import write_layers
from llmc.typed_dicts import differences

GOOD = {"min_decode": 25, "max_first_token": 4, "max_kld": 0.3, "max_kld_p99": 9, "max_kld_p999": 9,
        "min_top1": "60%", "max_ram": "1GB", "max_size": "1MB",
        "max_ppl_increase": "90%", "stable": True}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """small.gguf, and reports of it and of a base; 30 tokens/s on local-cpu, KLD 0.16."""
    write_layers(tmp_path / "small.gguf", "Q4_0", 2, 128, 256)
    report = whole("small.gguf", 1, 5, 0.2, 30.0)
    report["artifact"] |= {"path": str(tmp_path / "small.gguf"), "sha256": hash_artifact(tmp_path / "small.gguf")}
    write(tmp_path, whole("base", 1000_000, 1, 0.0, 10.0), report)
    return tmp_path


def gates(folder: Path, targets: dict[str, Any], **more: Any) -> Path:
    path = folder / "gates.yaml"
    content = {"artifacts": ["small.gguf"], "reports": ["0.json", "1.json"], "targets": targets, **more}
    path.write_text(yaml.safe_dump(content))
    return path


def results(path: Path) -> dict[str, dict[str, Any]]:
    return {r["gate"]: r for r in ship(read_gates(path))["artifacts"][0]["results"]}


def test_every_gate_kept(folder: Path) -> None:
    result = ship(read_gates(gates(folder, {"local-cpu": GOOD})))
    assert result["passed"], result
    assert differences(json.loads(json.dumps(result)), Shipping) == []
    assert {r["source"] for r in result["artifacts"][0]["results"]} == {"measured"}
    assert result["artifacts"][0]["sha256"] == hash_artifact(folder / "small.gguf")
    assert {"by", "host", "at", "versions"} == set(result["signed"])


@pytest.mark.parametrize("tighter", [{"min_decode": 31}, {"max_first_token": 3}, {"max_kld": 0.1},
                                     {"max_kld_p99": 0.1}, {"max_kld_p999": 0.1}, {"min_top1": "99%"},
                                     {"max_ram": "1MB"}, {"max_size": "1kB"}, {"max_ppl_increase": "1%"}])
def test_each_gate_can_be_missed(folder: Path, tighter: dict[str, Any]) -> None:
    found = results(gates(folder, {"local-cpu": GOOD | tighter}))
    assert [name for name, r in found.items() if not r["passed"]] == [next(iter(tighter)).split("_", 1)[1]]


def test_unstable_and_emulated_speeds_pass_nothing(folder: Path) -> None:
    report = json.loads((folder / "1.json").read_text())
    shaky = speed(30.0) | {"unstable": ["decode drifts by 30%"]}
    report["speeds"] = {"local-cpu": shaky, "arm": speed(30.0, "emulated-arm64")}
    (folder / "1.json").write_text(json.dumps(report))
    found = results(gates(folder, {"local-cpu": {"stable": True, "min_decode": 10}}))
    assert not found["stable"]["passed"]
    assert "drifts" in found["stable"]["why"]
    assert not found["decode"]["passed"]
    found = results(gates(folder, {"arm": {"stable": True, "min_decode": 1}}))
    assert not found["stable"]["passed"]
    assert not found["decode"]["passed"]


def test_an_estimate_passes_only_where_the_file_says_so(folder: Path) -> None:
    slow = {"pi5": {"min_decode": 1, "max_ram": "1GB"}}
    found = results(gates(folder, slow))
    assert not found["decode"]["passed"]
    assert "not measured on pi5" in found["decode"]["why"]
    found = results(gates(folder, slow, allow_estimates=True))
    assert found["decode"]["passed"]
    assert found["decode"]["source"] == "estimate"
    assert not results(gates(folder, {"pi5": {"min_decode": 1e9}}, allow_estimates=True))["decode"]["passed"]


def test_a_file_that_changed_since_it_was_measured_is_refused(folder: Path) -> None:
    with (folder / "small.gguf").open("ab") as f:
        f.write(b"\0")
    with pytest.raises(UserError, match="changed since it was measured"):
        ship(read_gates(gates(folder, {"local-cpu": GOOD})))
    (folder / "small.gguf").unlink()
    with pytest.raises(UserError, match=r"there is no .*small\.gguf"):
        ship(read_gates(gates(folder, {"local-cpu": GOOD})))


def test_all_problems_of_a_gates_file_are_told_at_once(folder: Path) -> None:
    path = gates(folder, {"a": {"min_speed": 1, "min_decode": "fast"}, "b": {}}, run="yes", colour="red", artifacts=[],
                 eval={"texts": 1})
    with pytest.raises(UserError) as e:
        read_gates(path)
    for part in ("min_speed", "'fast'", "target b", "run must be", "'colour'", "'texts'", "name what would ship"):
        assert part in e.value.problem, part
    for content in ("[", "- a"):
        path.write_text(content)
        with pytest.raises(UserError):
            read_gates(path)
    with pytest.raises(UserError, match="no gates file"):
        read_gates(folder / "none.yaml")


def test_the_command_writes_what_it_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "signed"
    assert run(["ship", str(gates(folder, {"local-cpu": GOOD})), "-o", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((folder / "signed.json").read_text())
    text = (folder / "signed.md").read_text()
    assert text == summary(result)
    assert "**May ship.**" in text
    assert result["artifacts"][0]["sha256"] in text
    assert run(["ship", str(gates(folder, {"local-cpu": GOOD | {"max_kld": 0.01}})), "-o", str(out)]) == 1
    assert "MISSED" in capsys.readouterr().out
    assert "**Must not ship.**" in (folder / "signed.md").read_text()


def test_what_is_missing_is_measured_and_kept(made: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "gates.yaml"
    path.write_text(yaml.safe_dump({
        "artifacts": [str(made.gguf)], "run": True, "base": str(made.base), "eval": {"chunks": 2, "context": 64},
        "prompt": 16, "context": 64,
        "targets": {"local-cpu": {"min_decode": 1e-3, "max_kld": 100, "max_first_token": 100}}}))
    result = ship(read_gates(path))
    found = {r["gate"]: r for r in result["artifacts"][0]["results"]}
    assert {r["source"] for r in found.values()} == {"measured"}
    assert found["kld"]["passed"]
    assert found["decode"]["passed"] == ("UNSTABLE" not in found["decode"]["figure"]["note"])  # a busy machine's is no figure
    kept = tmp_path / f"{made.gguf.name}.report.json"
    before = kept.read_bytes()
    again = ship(read_gates(path))
    assert again["artifacts"] == result["artifacts"]
    assert kept.read_bytes() == before
