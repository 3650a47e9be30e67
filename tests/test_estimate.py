"""Estimates: the roofline by hand, profiles with a source for every figure, and every published point within its interval."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from llmc.errors import UserError
from llmc.evals.fit import estimate as e
from llmc.runtimes.targets import kernels
from llmc.runtimes.targets.profile import FIGURES, parse, profile_ids, read_profile

NAMED = {"pi4", "pi5", "orin-nano", "sd8gen2", "sd8gen3", "m1", "m2", "m3", "m4", "laptop-cpu", "laptop-gpu"}
CACHE = {"layers": 2, "kv_heads": 2, "head_dim": 8, "window": None, "sliding_layers": 0}
MODEL = e.Model("m", 1000, {"Q4_0": 600, "F32": 200}, 1500, layers=2, heads=4, vocabulary=10, cache=CACHE)
RATES = e.Rates("t", "b", 10_000, {"Q4_0": (1.0, 2.0, 3.0), e.OTHER: (10.0, 20.0, 40.0)},
                {"Q4_0": (100.0, 200.0, 400.0), e.OTHER: (50.0, 100.0, 200.0)}, (1.0, 2.0, 3.0))


def test_decode_is_bytes_over_rates_and_the_layers() -> None:
    got = e.estimate(MODEL, RATES, depth=5)["decode"]
    kv = 2 * 2 * 2 * 8 * 2 * 5
    assert got["mid"] == pytest.approx(1 / (600 / 2 + 200 / 20 + kv / 20 + 2 * 2))
    assert got["low"] == pytest.approx(1 / (600 / 1 + 200 / 10 + kv / 10 + 2 * 3))
    assert got["high"] == pytest.approx(1 / (600 / 3 + 200 / 40 + kv / 40 + 2 * 1))


def test_measured_attention_counts_where_it_costs_more_than_the_caches_bytes() -> None:
    """MODEL has two query heads to a key head: nearer to one than to four."""
    dear = e.Attention([(10, (1.0, 2.0, 3.0)), (20, (2.0, 3.0, 4.0))], (0.1, 0.2, 0.3))
    free = e.Attention([(10, (0.0, 0.0, 0.0))], (0.0, 0.0, 0.0))
    with_it, without = (dataclasses.replace(RATES, attention=a) for a in ({1: dear, 4: free}, {1: free, 4: dear}))
    others = 600 / 2 + 200 / 20 + 2 * 2
    for depth, each in ((0, 0.0), (5, 1.0), (10, 2.0), (15, 2.5), (20, 3.0), (40, 5.0)):
        assert e.estimate(MODEL, with_it, depth=depth)["decode"]["mid"] == pytest.approx(1 / (others + 2 * 32 * each))
    assert e.estimate(MODEL, without, depth=15)["decode"] == e.estimate(MODEL, RATES, depth=15)["decode"]
    low, high = (e.estimate(MODEL, with_it, depth=10)["decode"][k] for k in ("low", "high"))
    assert (1 / low, 1 / high) == pytest.approx((620 + 6 + 2 * 32 * 3, 200 + 5 + 2 + 2 * 32 * 1))
    weights = 2 * 7 * 1500 * (0.75 / 200 + 0.25 / 100)
    assert 7 / e.estimate(MODEL, with_it, prompt=7)["prefill"]["mid"] == pytest.approx(weights + 7 * 7 / 2 * 2 * 32 * 0.2)
    windowed = dataclasses.replace(MODEL, cache=CACHE | {"window": 10, "sliding_layers": 1})
    assert e.estimate(windowed, with_it, depth=20)["decode"]["mid"] == pytest.approx(1 / (others + 32 * (3.0 + 2.0)))


def test_prefill_has_attentions_quadratic_share() -> None:
    def seconds(n: int) -> float:
        return n / e.estimate(MODEL, RATES, prompt=n)["prefill"]["mid"]

    per_flop = 0.75 / 200 + 0.25 / 100
    assert seconds(7) == pytest.approx((2 * 7 * 1500 + 2 * 49 * 2 * 4 * 8) * per_flop)
    assert seconds(200) > 2 * seconds(100)
    first = e.estimate(MODEL, RATES, prompt=7)["first_token"]
    assert first["mid"] == pytest.approx(seconds(7))
    assert first["low"] < first["mid"] < first["high"]


def test_a_window_bounds_the_cache_and_attention() -> None:
    windowed = dataclasses.replace(MODEL, cache=CACHE | {"window": 16, "sliding_layers": 2})
    assert windowed.kv_bytes(1000) == MODEL.kv_bytes(16)
    assert e.estimate(windowed, RATES, prompt=500)["prefill"]["mid"] > e.estimate(MODEL, RATES, prompt=500)["prefill"]["mid"]


def test_memory_is_the_file_the_cache_and_the_logits() -> None:
    got = e.estimate(MODEL, RATES, context=100)
    least = 1000 + 2 * 2 * 2 * 8 * 2 * 100 + 4 * 100 * 10
    assert got["memory"]["low"] == least
    assert got["ram"] == got["memory"]["mid"] == least + 600 + e.PROCESS  # Q4_0 is there twice
    assert not got["fits"]
    assert e.estimate(MODEL, dataclasses.replace(RATES, ram=got["ram"]), context=100)["fits"]


def test_every_named_device_is_there_and_every_figure_has_a_source() -> None:
    assert set(profile_ids()) == NAMED
    for id in NAMED:
        profile = read_profile(id)
        for figure in (getattr(profile, f) for f in FIGURES):
            assert figure is None or (figure.url.startswith("https://") and figure.says)
        assert profile.features_url.startswith("https://")
        assert 1e9 <= profile.bandwidth.value <= 1e12
        assert profile.measured or profile.like in NAMED
        for m in profile.measured:
            assert m.decode or m.prefill, m


@pytest.mark.parametrize(("id", "most"), [("pi4", 0.05), ("pi5", 0.20), ("m2", 0.06), ("m3", 0.08), ("m4", 0.15)])
def test_each_published_point_is_foretold_by_the_others(id: str, most: float) -> None:
    """Left out in turn: types and sizes that the rates were not taken from."""
    points = e.left_out(read_profile(id))
    assert len(points) >= 2
    assert max(abs(p["error"]) for p in points) < most, points
    assert all(p["inside"] for p in points), points


def test_a_chip_without_points_takes_the_older_ones_rates_by_bandwidth_with_a_wider_interval() -> None:
    old, new = (e.rates_of_profile(read_profile(id)) for id in ("sd8gen2", "sd8gen3"))
    assert new.read[e.OTHER][1] == pytest.approx(old.read[e.OTHER][1] * 76.8 / 67.2)
    assert new.read[e.OTHER][2] / new.read[e.OTHER][0] > old.read[e.OTHER][2] / old.read[e.OTHER][0]
    assert "Snapdragon 8 Gen 2" in new.basis


def test_a_figure_without_a_source_is_refused() -> None:
    whole: dict[str, Any] = {"name": "n", "unit": "cpu", "features": [], "features_url": "https://a", "like": "pi5",
                             **{f: {"value": 1, "url": "https://a", "says": "s"} for f in FIGURES}}
    assert parse("x", whole).name == "n"
    for broken in ({"cores": 4}, {"ram": {"value": 1, "url": "", "says": "s"}}, {"colour": "red"}, {"like": None},
                   {"measured": [{"model": "m", "type": "Q4_0", "url": "", "says": "s", "decode": 1.0}]}):
        content = {k: v for k, v in {**whole, **broken}.items() if v is not None}
        with pytest.raises(UserError):
            parse("x", content)
    with pytest.raises(UserError, match="pi5"):
        read_profile("pi6")


def test_kernels_are_measured_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llama_cpp")
    monkeypatch.setattr(kernels, "LAYERS", 1)
    monkeypatch.setattr(kernels, "WIDTH", 256)
    monkeypatch.setattr(kernels, "FFN", 256)
    monkeypatch.setattr(kernels, "TOKENS", 6)
    monkeypatch.setattr(kernels, "PROMPT", 16)
    monkeypatch.setattr(kernels, "DEPTHS", (32, 64))
    cache = tmp_path / "k.json"
    first = kernels.kernel_rates({"Q4_0", "GPTQ int4"}, 1, cache)
    assert set(first["types"]) == {"Q4_0"}
    for low, mid, high in (*first["types"]["Q4_0"].values(), first["layer_seconds"]):
        assert 0 < low <= mid <= high
    assert set(first["attention"]) == {"1", "4"}
    for seconds in first["attention"].values():
        assert [n for n, _ in seconds["decode"]] == [32, 64]
        for low, mid, high in (*(s for _, s in seconds["decode"]), seconds["prefill"]):
            assert 0 <= low <= mid <= high < 1  # differences of times: 0 where noise hides them
    assert kernels.kernel_rates({"Q4_0"}, 1, cache) == first
    more = kernels.kernel_rates({"Q4_0", "Q6_K"}, 1, cache)
    assert more["types"]["Q4_0"] == first["types"]["Q4_0"]
    assert "Q6_K" in more["types"]
    rates = e.rates_here({"Q4_0"}, 1, 1e12, cache=cache)
    assert rates.read["Q4_0"][1] == first["types"]["Q4_0"]["decode"][1]
    assert e.rates_here({"Q4_0"}, 1, 1.0, cache=cache).read["Q4_0"][1] == 1.0  # no faster than the memory is read
