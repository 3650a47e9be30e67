"""llmc fit: answers from measured figures and from intervals, the advice's numbers put to the test, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from reports import FACTS, speed, whole, write

from llmc.cli import run
from llmc.errors import UserError
from llmc.evals.fit import advice as fit_advice
from llmc.evals.fit import estimate as e
from llmc.evals.fit import run as f
from llmc.evals.fit.config import FitConfig
from llmc.evals.fit.validate import validate
from llmc.evals.shared_options import parse_bytes
from llmc.runtimes.targets.kernels import write_layers
from llmc.runtimes.targets.profile import read_profile

CACHE = {"layers": 16, "kv_heads": 4, "head_dim": 64, "window": None, "sliding_layers": 0}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "layers.gguf"
    write_layers(path, "Q4_0", 2, 128, 256)
    return path


def judged(result: dict[str, Any], n: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = result["targets"][0]["candidates"][n]
    return found


def test_answers() -> None:
    measured = f.Figure((9.0, 10.0, 11.0), "measured")
    assert [f.answer(measured, limit, False) for limit in (8.9, 10.0, 11.1)] == ["yes", "maybe", "no"]
    assert [f.answer(measured, limit, True) for limit in (8.9, 10.0, 11.1)] == ["no", "maybe", "yes"]
    assert f.answer(None, 1.0, True) == "unknown"
    assert f.answer(f.Figure((9.0, 10.0, 11.0), "measured", "; UNSTABLE"), 1.0, False) == "maybe"


def test_sizes() -> None:
    assert [parse_bytes("--max-ram", s) for s in ("2GB", "90 MB", "1.5kB", "85MiB", "7B", "1.2 GB", "512kB")] == [
        2 * 10**9, 90 * 10**6, 1500, 85 << 20, 7, 1_200_000_000, 512_000]
    for wrong in ("2 gallons", "", "-1GB", "90", "MB", "-3MB"):
        with pytest.raises(UserError, match="--max-ram"):
            parse_bytes("--max-ram", wrong)


def test_the_model_is_what_was_written(file: Path) -> None:
    model = e.model_of(file)
    decoder = 2 * (4 * 128 * 128 + 3 * 128 * 256)
    assert model.prefill_weights == decoder
    assert model.token_bytes["Q4_0"] == (decoder + 256 * 128) * 18 // 32
    assert (model.layers, model.heads, model.vocabulary) == (2, 2, 256)
    assert model.kv_bytes(10) == 2 * 2 * 2 * 64 * 2 * 10


def test_a_measurement_is_taken_before_an_estimate(tmp_path: Path) -> None:
    paths = write(tmp_path, whole("a", 1000_000, 1, 0.0, 10.0), whole("b", 250_000, 5, 0.2, 30.0))
    result = f.fit(FitConfig(tuple(paths), ("local-cpu",), min_decode=20.0, max_kld=0.3, max_size="1MB"))
    assert [c["fits"] for c in result["targets"][0]["candidates"]] == ["no", "yes"]
    assert judged(result, 1)["figures"]["decode"]["source"] == "measured"
    assert result["fits"]
    tight = f.fit(FitConfig(tuple(paths), ("local-cpu",), min_decode=30.0))
    assert judged(tight, 1)["fits"] == "maybe"  # the limit lies within the quartiles
    assert not tight["fits"]


def test_emulated_and_unstable_speeds_prove_nothing(tmp_path: Path) -> None:
    report = whole("a", 1000_000, 1, 0.0, 100.0)
    shaky = copy.deepcopy(report)
    shaky["speeds"]["local-cpu"]["unstable"] = ["decode drifts"]
    path = write(tmp_path, shaky)[0]
    assert judged(f.fit(FitConfig((path,), min_decode=1.0)))["fits"] == "maybe"
    report["speeds"] = {"pi5": {**speed(100.0), "target": {"name": "pi5", "address": "emulated-arm64", "emulated": True,
                                                           "facts": FACTS}}}
    path.write_text(json.dumps(report))
    assert judged(f.fit(FitConfig((path,), ("pi5",), min_decode=1.0)))["figures"]["decode"]["answer"] == "unknown"


def test_a_profile_answers_by_its_interval(file: Path) -> None:
    model, rates = e.model_of(file), e.rates_of_profile(read_profile("pi4"))
    speeds = e.estimate(model, rates, 64, 512, 64)["decode"]
    for limit, wanted in ((0.9 * speeds["low"], "yes"), (speeds["mid"], "maybe"), (1.1 * speeds["high"], "no")):
        result = f.fit(FitConfig((file,), ("pi4",), min_decode=limit, context=64))
        assert judged(result)["fits"] == wanted
        assert judged(result)["figures"]["decode"]["source"] == "estimate"
        assert result["fits"] == (wanted == "yes")
    assert "tokens of Llama" not in result["targets"][0]["basis"]
    assert any("next device up" in line for line in result["targets"][0]["advice"])


def test_the_size_that_is_advised_would_decode_as_fast() -> None:
    model = e.Model("m", 900_000_000, {"Q8_0": 800_000_000, "F32": 100_000}, 700_000_000, 16, 16, 1000, CACHE,
                    decoder_bytes=744_000_000)
    rates = e.rates_of_profile(read_profile("pi4"))
    limit = 1.3 * e.estimate(model, rates, 512)["decode"]["low"]
    size = fit_advice._by_decode(model, rates, {"decode": (limit, False)}, 512)
    assert size is not None
    assert size < model.file_bytes
    scale = (size - (model.file_bytes - 800_100_000)) / 800_100_000
    less = e.Model("m", int(size), {k: int(n * scale) for k, n in model.token_bytes.items()}, 1, 16, 16, 1000, CACHE)
    assert e.estimate(less, rates, 512)["decode"]["low"] == pytest.approx(limit, rel=1e-3)


def test_the_context_that_is_advised_would_fit() -> None:
    model = e.Model("m", 10_000_000, {"Q4_0": 10_000_000}, 1, 8, 8, 100, CACHE)
    rates = e.rates_of_profile(read_profile("pi5"))
    limit = 140_000_000
    lines = list(fit_advice.smaller(model, rates, {"ram": (limit, True)}, 8192))
    context = int(next(line for line in lines if "--context" in line).split()[-1])
    assert e.memory(model, context)[2] <= limit < e.memory(model, context + 64)[2]


def test_validate_holds_estimates_against_reports_and_publications(tmp_path: Path) -> None:
    points = validate(())
    assert {"pi4", "pi5", "m2"} <= {p["target"] for p in points}
    assert all(p["error"] == pytest.approx(p["mid"] / p["measured"] - 1) for p in points)


def test_the_command(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["fit", str(file), "--target", "pi5", "--min-decode", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fits"]
    assert run(["fit", str(file), "--target", "pi5", "--min-decode", "1e9"]) == 1
    out = capsys.readouterr().out
    assert "estimate" in out
    assert "make:" in out
    assert run(["fit", str(file), "--target", "pi9"]) == 2
    assert "pi5" in capsys.readouterr().err
    assert run(["fit"]) == 2
    assert run(["fit", "--profiles"]) == 0
    assert "https://" in capsys.readouterr().out
