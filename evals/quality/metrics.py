"""Perplexity, KL divergence and top-1 agreement from logits, with standard errors. Pure numpy.

Each mean has two standard errors. `se_token` assumes that tokens are independent, as llama-perplexity does. The tokens of one
chunk are correlated, so `se` is computed from the means of the chunks (clusters of equal size). Trust `se`. It is None if
there is only one chunk.
"""

from __future__ import annotations

import numpy as np

from llmc.evals.report.schema import Stat, Tails, TextMetrics, TokenStat

DRAWS = 200  # of the bootstrap
QUANTILES = {"p90": 0.9, "p99": 0.99, "p999": 0.999}
ROWS = 32  # rows of logits processed at once: a few tens of MB for any vocabulary


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-softmax of each row, float32 [n, vocab]. The maximum of the row is subtracted first. Sums are float64."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    total = np.exp(shifted).sum(axis=1, dtype=np.float64, keepdims=True)
    return np.asarray(shifted - np.log(total).astype(np.float32), dtype=np.float32)


def nll(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Negative log-likelihood of each target in nats: logits [n, vocab], targets int [n] -> float32 [n]."""
    out = np.empty(len(targets), dtype=np.float32)
    for i in range(0, len(targets), ROWS):
        part = log_softmax(logits[i : i + ROWS])
        out[i : i + ROWS] = -np.take_along_axis(part, targets[i : i + ROWS, None].astype(np.int64), axis=1)[:, 0]
    return out


def divergence(base: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """KL(base || other) of each row in nats, float32 [n]; whether both give the same token the highest logit, bool [n].

    base, other: logits [n, vocab]. A divergence is never negative: what float32 leaves below zero counts as 0.
    """
    kld = np.empty(len(base), dtype=np.float32)
    for i in range(0, len(base), ROWS):
        p, q = log_softmax(base[i : i + ROWS]), log_softmax(other[i : i + ROWS])
        kld[i : i + ROWS] = (np.exp(p) * (p - q)).sum(axis=1, dtype=np.float64).clip(min=0)
    return kld, base.argmax(axis=1) == other.argmax(axis=1)


def mean(values: np.ndarray) -> TokenStat:
    """Mean of `values` [chunks, tokens] and both standard errors."""
    v = values.astype(np.float64)
    chunks, n = len(v), v.size
    return {
        "value": float(v.mean()),
        "se": float(v.mean(axis=1).std(ddof=1) / np.sqrt(chunks)) if chunks > 1 else None,
        "se_token": float(v.std(ddof=1) / np.sqrt(n)) if n > 1 else None,
    }


def tails(values: np.ndarray) -> Tails:
    """Quantiles of `values` [chunks, tokens] over all tokens, with standard errors; None for a single chunk.

    The errors are those of a bootstrap over whole chunks, because the tokens of one depend on each other (Efron & Tibshirani,
    An Introduction to the Bootstrap, 1993, sections 6 and 8.5). Its draws are fixed. A bootstrap of the maximum is
    wrong at any length of the text (section 7.4)."""
    v = values.astype(np.float64)
    order = np.argsort(v, axis=None, kind="stable")
    ranked, chunk = v.ravel()[order], order // v.shape[1]
    chance = np.random.default_rng(0)
    drawn = [np.bincount(chance.integers(0, len(v), len(v)), minlength=len(v)) for _ in range(DRAWS if len(v) > 1 else 0)]
    again = np.array([_quantiles(ranked, counts[chunk]) for counts in drawn])
    errors = again.std(axis=0, ddof=1).tolist() if len(again) else [None] * len(QUANTILES)
    found = {name: Stat(value=float(value), se=error) for name, value, error in
             zip(QUANTILES, _quantiles(ranked, np.ones(v.size, np.int64)), errors, strict=True)}
    return {"p90": found["p90"], "p99": found["p99"], "p999": found["p999"]}


def _quantiles(ranked: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """QUANTILES of values that are there `counts` times each, as numpy.quantile has them. ranked: the values, ascending."""
    below = np.cumsum(counts)
    place = np.array(list(QUANTILES.values())) * (below[-1] - 1)
    low, high = (ranked[np.searchsorted(below, f(place), side="right")] for f in (np.floor, np.ceil))
    return np.asarray(low + (place - np.floor(place)) * (high - low))


def scaled(stat: TokenStat, value: float, slope: float) -> TokenStat:
    """`stat` after a smooth function, by the delta method. value: the function's value. slope: its derivative, which scales
    the standard errors."""
    se, se_token = (None if e is None else e * abs(slope) for e in (stat["se"], stat["se_token"]))
    return {"value": value, "se": se, "se_token": se_token}


def perplexity(token_nll: np.ndarray) -> TokenStat:
    """exp(mean NLL) of `token_nll` [chunks, tokens], nats."""
    m = mean(token_nll)
    ppl = float(np.exp(m["value"]))
    return scaled(m, ppl, ppl)


def perplexity_ratio(token_nll: np.ndarray, reference_nll: np.ndarray) -> TokenStat:
    """Perplexity / reference perplexity, from paired differences token by token. Both arrays are [chunks, tokens], nats."""
    m = mean(token_nll.astype(np.float64) - reference_nll)
    ratio = float(np.exp(m["value"]))
    return scaled(m, ratio, ratio)


def summarise(token_nll: np.ndarray, scored_bytes: int, kld: np.ndarray | None, top1: np.ndarray | None,
              base_nll: np.ndarray | None) -> TextMetrics:
    """All metrics of one text. Arrays are [chunks, tokens]; the last three are None if there is no base.

    scored_bytes: length of the scored text in UTF-8.
    """
    m = mean(token_nll)
    per_byte = token_nll.size / scored_bytes / np.log(2)
    out: TextMetrics = {
        "perplexity": perplexity(token_nll),
        "bits_per_byte": scaled(m, m["value"] * per_byte, per_byte),
        "kld": None, "top1": None, "base_perplexity": None, "perplexity_ratio": None,
    }
    if kld is not None and top1 is not None and base_nll is not None:
        far = tails(kld)
        out["kld"] = {**mean(kld), "median": float(np.median(kld)), "p99": far["p99"]["value"], "max": float(kld.max()),
                      "tails": far}
        out["top1"] = mean(top1)
        out["base_perplexity"] = perplexity(base_nll)
        out["perplexity_ratio"] = perplexity_ratio(token_nll, base_nll)
    return out
