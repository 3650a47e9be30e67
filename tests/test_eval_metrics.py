"""Metrics against slow and obvious formulas in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.evals.quality import metrics


def slow_log_softmax(row: np.ndarray) -> list[float]:
    top = max(row.tolist())
    total = math.fsum(math.exp(v - top) for v in row.tolist())
    return [v - top - math.log(total) for v in row.tolist()]


def draw(seed: int, n: int = 70, vocab: int = 33, spread: float = 5.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(0, spread, (n, vocab)) + 300).astype(np.float32)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 20))
def test_nll_and_divergence(seed: int, spread: float) -> None:
    base, other = draw(seed, spread=spread), draw(seed + 1, spread=spread)
    targets = np.random.default_rng(seed).integers(0, 33, 70)
    p, q = [slow_log_softmax(r) for r in base], [slow_log_softmax(r) for r in other]
    np.testing.assert_allclose(metrics.nll(other, targets), [-q[i][t] for i, t in enumerate(targets)], rtol=1e-4, atol=1e-4)
    kld, same = metrics.divergence(base, other)
    slow = [math.fsum(math.exp(a) * (a - b) for a, b in zip(x, y, strict=True)) for x, y in zip(p, q, strict=True)]
    np.testing.assert_allclose(kld, slow, rtol=1e-3, atol=1e-4)
    assert same.tolist() == [x.index(max(x)) == y.index(max(y)) for x, y in zip(p, q, strict=True)]
    assert (kld > -1e-5).all()


def test_small_divergences_keep_their_digits() -> None:
    base = draw(3, n=200, vocab=5000)
    other = base + np.random.default_rng(4).normal(0, 0.01, base.shape).astype(np.float32)
    p, q = (np.array([slow_log_softmax(r) for r in x]) for x in (base, other))
    np.testing.assert_allclose(metrics.divergence(base, other)[0].mean(), (np.exp(p) * (p - q)).sum(1).mean(), rtol=1e-3)


def test_identical_models_do_not_diverge() -> None:
    logits = draw(1)
    kld, same = metrics.divergence(logits, logits.copy())
    assert not kld.any()
    assert same.all()


def test_uniform_logits_have_the_vocabulary_as_perplexity() -> None:
    nll = metrics.nll(np.full((50, 1234), 7.0, np.float32), np.arange(50)).reshape(5, 10)
    ppl = metrics.perplexity(nll)
    assert ppl["value"] == pytest.approx(1234, rel=1e-6)
    assert ppl["se"] == pytest.approx(0, abs=1e-3)


def test_standard_errors() -> None:
    x = np.random.default_rng(0).gamma(2.0, size=(9, 31))
    m = metrics.mean(x)
    flat, clusters = x.ravel().tolist(), [sum(row) / 31 for row in x.tolist()]
    grand = sum(flat) / len(flat)
    assert m["value"] == pytest.approx(grand)
    assert m["se_token"] == pytest.approx(math.sqrt(sum((v - grand) ** 2 for v in flat) / (len(flat) - 1) / len(flat)))
    assert m["se"] == pytest.approx(math.sqrt(sum((c - grand) ** 2 for c in clusters) / 8 / 9))
    assert metrics.mean(x[:1])["se"] is None


def test_cluster_error_covers_what_correlated_tokens_do() -> None:
    """Tokens of a chunk share a level: the mean's true spread is the chunks', which the error per token misses."""
    rng = np.random.default_rng(5)
    draws = [rng.normal(0, 1, (20, 1)) + rng.normal(0, 1, (20, 50)) for _ in range(400)]
    true = np.std([d.mean() for d in draws])
    assert np.mean([metrics.mean(d)["se"] for d in draws]) == pytest.approx(true, rel=0.1)
    assert np.mean([metrics.mean(d)["se_token"] for d in draws]) < true / 3


def test_top1_error_is_the_binomial_one() -> None:
    hits = np.random.default_rng(2).random((10, 100)) < 0.7
    m = metrics.mean(hits)
    assert m["value"] == hits.mean()
    assert m["se_token"] == pytest.approx(math.sqrt(m["value"] * (1 - m["value"]) / 999))


def test_paired_ratio() -> None:
    """The error of a ratio of perplexities on the same tokens, against a bootstrap over chunks."""
    rng = np.random.default_rng(7)
    a = rng.gamma(2, 1.5, (60, 40))
    b = a + rng.normal(0.1, 0.3, a.shape) + rng.normal(0, 0.1, (60, 1))
    ratio = metrics.perplexity_ratio(b, a)
    assert ratio["value"] == pytest.approx(math.exp(b.mean()) / math.exp(a.mean()))
    boot = []
    for _ in range(2000):
        rows = rng.integers(0, 60, 60)
        boot.append(math.exp(b[rows].mean() - a[rows].mean()))
    assert ratio["se"] == pytest.approx(np.std(boot), rel=0.1)
    alone = math.hypot(metrics.perplexity(a)["se"] / metrics.perplexity(a)["value"],
                       metrics.perplexity(b)["se"] / metrics.perplexity(b)["value"])
    assert ratio["se"] < alone / 3  # that is what pairing is for


def test_tails_are_the_quantiles_of_all_tokens() -> None:
    kld = np.random.default_rng(3).gamma(0.5, 1, (7, 333)).astype(np.float32)
    found = metrics.tails(kld)
    for name, share in (("p90", 0.9), ("p99", 0.99), ("p999", 0.999)):
        assert found[name]["value"] == pytest.approx(np.quantile(kld.astype(np.float64), share), rel=1e-9)
    assert metrics.tails(kld) == found, "its draws are fixed"
    assert metrics.tails(kld[:1])["p99"]["se"] is None


def test_errors_of_tails_are_those_of_a_bootstrap_over_chunks() -> None:
    rng = np.random.default_rng(5)
    kld = rng.gamma(2, 1, (50, 40)) * rng.gamma(3, 1, (50, 1))
    boot = [np.quantile(kld[rng.integers(0, 50, 50)], 0.9) for _ in range(2000)]
    assert metrics.tails(kld)["p90"]["se"] == pytest.approx(np.std(boot), rel=0.2)
    alike = np.tile(rng.gamma(2, 1, (1, 40)), (8, 1))
    assert metrics.tails(alike)["p99"]["se"] == pytest.approx(0, abs=1e-12), "chunks that are alike"


def test_the_error_of_a_tail_is_that_of_many_texts() -> None:
    """Independent exponential tokens: the standard error of their 90 % quantile is known."""
    rng = np.random.default_rng(9)
    found = [metrics.tails(rng.exponential(1, (100, 50)))["p90"]["se"] for _ in range(10)]
    assert np.mean(found) == pytest.approx(math.sqrt(0.9 * 0.1 / 5000) / 0.1, rel=0.2)


def test_summary() -> None:
    rng = np.random.default_rng(1)
    nll, base, kld = (rng.gamma(2, 1, (4, 25)).astype(np.float32) for _ in range(3))
    top1 = rng.random((4, 25)) < 0.5
    s = metrics.summarise(nll, 321, kld, top1, base)
    assert s["bits_per_byte"]["value"] == pytest.approx(nll.sum(dtype=np.float64) / math.log(2) / 321)
    assert s["kld"]["value"] == pytest.approx(kld.mean(), rel=1e-6)
    ranked = sorted(kld.ravel().tolist())
    assert s["kld"]["max"] == ranked[-1]
    assert s["kld"]["median"] == pytest.approx((ranked[49] + ranked[50]) / 2)
    assert s["kld"]["p99"] == pytest.approx(ranked[98] + 0.01 * (ranked[99] - ranked[98]), rel=1e-5)
    assert s["kld"]["tails"]["p99"]["value"] == s["kld"]["p99"] <= s["kld"]["tails"]["p999"]["value"] <= s["kld"]["max"]
    assert s["perplexity_ratio"]["value"] == pytest.approx(s["perplexity"]["value"] / s["base_perplexity"]["value"])
    alone = metrics.summarise(nll, 321, None, None, None)
    assert (alone["kld"], alone["top1"], alone["perplexity_ratio"]) == (None, None, None)
    assert alone["perplexity"] == s["perplexity"]
