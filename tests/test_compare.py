"""`llmc compare`: paired differences, refusals, and the command."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from reports import CHUNKS, config, speed, tokens, whole, write

from llmc.cli import run
from llmc.errors import UserError
from llmc.evals.compare.run import compare
from llmc.evals.compare.tables import tables
from llmc.evals.pages.compare import page


def test_paired_differences(tmp_path: Path) -> None:
    paths = write(tmp_path, whole("a", 1000, 1, 0.1, 10.0), whole("b", 250, 5, 0.3, 30.0))
    d = compare(config(paths))["artifacts"][1]["differences"]
    for n in (0, 1):
        a, b = tokens(1 + n, 0.1), tokens(5 + n, 0.3)
        for key in ("kld", "top1"):
            means = b[key].astype(float).mean(1) - a[key].astype(float).mean(1)  # a chunk at a time
            assert d["texts"][n][key]["value"] == pytest.approx(means.mean(), abs=1e-9)
            assert d["texts"][n][key]["se"] == pytest.approx(math.sqrt(means.var(ddof=1) / CHUNKS))
        logs = b["nll"].astype(float).mean(1) - a["nll"].astype(float).mean(1)
        ratio = d["texts"][n]["perplexity_ratio"]
        assert ratio["value"] == pytest.approx(math.exp(logs.mean()), rel=1e-6)
        assert ratio["se"] == pytest.approx(math.exp(logs.mean()) * math.sqrt(logs.var(ddof=1) / CHUNKS), rel=1e-6)
    assert d["size_ratio"] == 0.25
    faster = d["speeds"]["local-cpu"]
    assert faster["decode_speedup"]["value"] == pytest.approx(3)
    assert faster["first_token_ratio"]["value"] == pytest.approx(1 / 3)
    one = np.log([0.98, 0.99, 1.0, 1.01, 1.02]).std(ddof=1) / math.sqrt(5)
    assert faster["decode_speedup"]["se"] == pytest.approx(3 * math.sqrt(2) * one)


def test_an_artifact_against_itself_differs_by_nothing(tmp_path: Path) -> None:
    one = whole("a", 1000, 1, 0.1, 10.0)
    two = copy.deepcopy(one)
    two["artifact"]["sha256"] = "e" * 64
    result = compare(config(write(tmp_path, one, two)))
    for t in result["artifacts"][1]["differences"]["texts"]:
        assert (t["perplexity_ratio"]["value"], t["perplexity_ratio"]["se"]) == (1, 0)
        assert (t["kld"]["value"], t["kld"]["se"], t["top1"]["value"]) == (0, 0, 0)
    assert [a["name"] for a in result["artifacts"]] == ["out/a", "out/a"]  # equal names: their paths are shown


PROTOCOL = ["text_sha256", "tokenizer_sha256", "ids_sha256", "context", "stride", "scored", "bos", "chunks", "scored_tokens",
            "bytes", "vocabulary"]


@pytest.mark.parametrize("field", PROTOCOL)
@pytest.mark.parametrize("text", [0, 1])
def test_unequal_protocols_are_refused(field: str, text: int, two_reports: list[Path]) -> None:
    r = json.loads(two_reports[1].read_text())
    p = r["quality"]["texts"][text]["protocol"]
    before = p[field]
    p[field] = before + 1 if isinstance(before, int) else f"other {before[:3]}"
    two_reports[1].write_text(json.dumps(r))
    with pytest.raises(UserError) as e:
        compare(config(two_reports))
    assert f"{field} (of the text {p['text']}) is {before!r} in one and {p[field]!r} in the other" in e.value.problem
    assert e.value.exit_code == 2


@pytest.mark.parametrize("field", ["prompt", "depth", "generate", "threads", "device", "cpu", "cores"])
def test_unequal_benches_are_refused(field: str, two_reports: list[Path]) -> None:
    r = json.loads(two_reports[1].read_text())
    protocol = r["speeds"]["local-cpu"]["protocol"]
    protocol[field] = other = "other" if isinstance(protocol[field], str) else 77
    two_reports[1].write_text(json.dumps(r))
    with pytest.raises(UserError, match=rf"{field} \(on local-cpu\) is .* and {other!r} in the other"):
        compare(config(two_reports))


def test_other_texts_and_other_bases_are_refused(two_reports: list[Path]) -> None:
    original = json.loads(two_reports[1].read_text())
    r = copy.deepcopy(original)
    r["quality"]["texts"].pop()
    two_reports[1].write_text(json.dumps(r))
    with pytest.raises(UserError, match="texts is"):
        compare(config(two_reports))
    r = copy.deepcopy(original)
    r["quality"]["base"]["sha256"] = "f" * 64
    two_reports[1].write_text(json.dumps(r))
    with pytest.raises(UserError, match="the base is base"):
        compare(config(two_reports))


def test_a_baseline_without_a_base_has_a_perplexity_to_compare(two_reports: list[Path]) -> None:
    r = json.loads(two_reports[0].read_text())
    r["quality"]["base"] = None
    for t in r["quality"]["texts"]:
        t |= {"kld": None, "top1": None, "perplexity_ratio": None, "base_perplexity": None}
        t["per_token"] = {"nll": t["per_token"]["nll"]}
    two_reports[0].write_text(json.dumps(r))
    result = compare(config(two_reports, max_ppl_increase="90%", max_kld="0.9"))
    changes = result["artifacts"][1]["differences"]["texts"][0]
    assert changes["kld"] is None
    assert changes["perplexity_ratio"]["value"] > 1
    assert page(result)
    assert tables(result)


def test_quality_and_speed_from_two_files_are_joined(tmp_path: Path, two_reports: list[Path]) -> None:
    r = json.loads(two_reports[1].read_text())
    parts = [{k: v for k, v in r.items() if k != drop} for drop in ("speeds", "quality")]
    split = [two_reports[0]]
    for i, part in enumerate(parts):
        split.append(tmp_path / f"part{i}.json")
        split[-1].write_text(json.dumps(part))
    assert compare(config(split)) == compare(config(two_reports))
    with pytest.raises(UserError, match="second report with a quality section of small"):
        compare(config([*split, split[1]]))


def test_speeds_are_compared_target_by_target(tmp_path: Path) -> None:
    one, two = whole("a", 1000, 1, 0.1, 10.0), whole("b", 250, 5, 0.3, 30.0)
    for r, decode in ((one, 2.0), (two, 3.0)):
        r["speeds"] |= {"pi": speed(decode, "pi"), "arm": speed(decode, "emulated-arm64")}
    del one["speeds"]["local-cpu"]
    found = compare(config(write(tmp_path, one, two), min_decode_speedup="1.4x"))
    speeds = found["artifacts"][1]["differences"]["speeds"]
    assert list(speeds) == ["pi"], "local-cpu was measured of one only, and an emulated speed is nothing to compare"
    assert speeds["pi"]["decode_speedup"]["value"] == pytest.approx(1.5)
    assert [(g["text"], g["passed"]) for g in found["gates"]] == [("pi", True)]
    titles = [title for title, _, _ in tables(found)]
    assert [t for t in titles if t.startswith("Speed")] == ["Speed on pi", "Speed on arm", "Speed on local-cpu"]
    html = page(found)
    assert "Speed on pi against divergence" in html
    assert "Speed on arm against divergence" not in html


def test_speeds_of_several_files_are_joined_by_target(tmp_path: Path) -> None:
    one = whole("a", 1000, 1, 0.1, 10.0)
    more = {**one, "speeds": {"pi": speed(2.0, "pi")}}
    del more["quality"]
    (found,) = compare(config(write(tmp_path, one, more)))["artifacts"]
    assert list(found["report"]["speeds"]) == ["local-cpu", "pi"]
    with pytest.raises(UserError, match="second report with the speed on pi of a"):
        compare(config(write(tmp_path, more, more)))


def test_speed_alone(two_reports: list[Path]) -> None:
    for path in two_reports:
        r = json.loads(path.read_text())
        del r["quality"]
        path.write_text(json.dumps(r))
    result = compare(config(two_reports, min_decode_speedup="2.5x"))
    assert result["passed"]
    assert result["artifacts"][1]["differences"]["texts"] is None
    assert "llmc eval ARTIFACT --base BASE" in page(result)
    with pytest.raises(UserError, match="--max-kld: the reports hold no such figure for small"):
        compare(config(two_reports, max_kld="0.1"))


def test_command_line(two_reports: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    names = [str(p) for p in two_reports]
    assert run(["compare", *names]) == 0
    out = capsys.readouterr().out
    assert "small" in out
    assert "±" in out
    assert Path("compare.html").is_file()
    assert run(["compare", *names, "--json", "--page", "other.html", "--max-kld", "0.9"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["passed"]
    assert "per_token" not in json.dumps(printed)
    assert Path("other.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert run(["compare", *names, "--max-kld", "0.1", "--min-decode-speedup", "9x"]) == 1
    out, err = capsys.readouterr()
    assert "MISSED" in out
    assert "--max-kld 0.1, measured" in err
    assert "--min-decode-speedup 9x, measured 3x" in err
    assert run(["compare", *names, "--max-kld", "ten"]) == 2
    assert run(["compare", names[0], "nowhere.json"]) == 2
    assert "no report nowhere.json" in capsys.readouterr().err


@pytest.mark.parametrize("content", [
    "", "{", "[]", "{}", '{"kind": "llmc-report"}',
    '{"kind": "llmc-report", "schema": 99, "artifact": {}, "versions": {}}',
])
def test_what_is_no_report(content: str, two_reports: list[Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text(content)
    with pytest.raises(UserError, match=r"bad\.json"):
        compare(config([two_reports[0], bad]))


def test_real_artifacts(made: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    """From eval and bench to the page, with what llmc makes."""
    common = ["--base", str(made.base), "--context", "64", "--chunks", "4", "--threads", "1"]
    for artifact_path, name in ((made.base, "base.json"), (made.gguf, "small.json")):
        assert run(["eval", str(artifact_path), *common, "-o", name]) == 0
    capsys.readouterr()
    assert run(["compare", "base.json", "small.json", "--json", "--max-ppl-increase", "1000%"]) == 0
    small = json.loads(capsys.readouterr().out)["artifacts"][1]
    t = small["report"]["quality"]["texts"][0]
    # against the base itself, the paired ratio is the one that eval gave
    changes = small["differences"]["texts"][0]
    assert changes["perplexity_ratio"]["value"] == pytest.approx(t["perplexity_ratio"]["value"], rel=1e-6)
    assert changes["kld"]["value"] == pytest.approx(t["kld"]["value"])
    assert "Error by layer" in Path("compare.html").read_text(encoding="utf-8")
