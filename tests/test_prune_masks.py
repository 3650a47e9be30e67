"""Masks by magnitude and by Wanda, and patterns, against their definitions."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.compress.prune.masks import keep_highest, keep_pattern, magnitude_mask, wanda_mask


def test_wanda_is_weight_times_input_norm_row_by_row() -> None:
    """A worked example: columns of norm 1, 2, 4, 8."""
    weight = torch.tensor([[8.0, -5.0, 2.0, 0.5], [1.0, -1.0, 1.0, -1.0]])
    squares = torch.tensor([1.0, 4.0, 16.0, 64.0])
    # scores: 8 10 8 4 and 1 2 4 8
    assert wanda_mask(weight, squares, 0.5, None).tolist() == [[False, True, True, False], [False, False, True, True]]
    assert wanda_mask(weight, squares, 0.25, None).tolist() == [[True, True, True, False], [False, True, True, True]]


def test_wanda_equals_the_definition_on_real_inputs() -> None:
    x, w = torch.randn(100, 24), torch.randn(6, 24)
    mask = wanda_mask(w, (x * x).sum(0), 0.5, None)
    for i in range(6):
        score = [abs(float(w[i, j])) * float(torch.linalg.vector_norm(x[:, j])) for j in range(24)]
        lowest = sorted(range(24), key=score.__getitem__)[:12]
        assert sorted(lowest) == (~mask[i]).nonzero().flatten().tolist()


def test_a_column_that_no_text_used_is_judged_like_the_mean_column() -> None:
    w, squares = torch.ones(1, 4), torch.tensor([0.0, 4.0, 4.0, 1.0])  # mean 2.25
    assert wanda_mask(w, squares, 0.25, None).tolist() == [[True, True, True, False]]
    assert wanda_mask(w, squares, 0.5, None).tolist() == [[False, True, True, False]]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 9999), rows=st.integers(1, 7), runs=st.integers(1, 6), pattern=st.sampled_from(["2:4", "4:8"]))
def test_patterns_have_their_zeros_in_every_run_and_keep_the_largest(seed: int, rows: int, runs: int, pattern: str) -> None:
    zeros, of = map(int, pattern.split(":"))
    score = torch.rand(rows, runs * of, generator=torch.Generator().manual_seed(seed)).mul(8).round()  # with ties
    by_run = keep_pattern(score, pattern).view(rows, runs, of)
    assert bool(((~by_run).sum(-1) == zeros).all())
    scores = score.view(rows, runs, of)
    kept = scores.masked_fill(~by_run, torch.inf).amin(-1)
    gone = scores.masked_fill(by_run, -torch.inf).amax(-1)
    assert bool((kept >= gone).all())


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 9999), rows=st.integers(1, 9), columns=st.integers(1, 40), share=st.floats(0.01, 0.99))
def test_magnitude_drops_exactly_the_share_and_the_smallest(seed: int, rows: int, columns: int, share: float) -> None:
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).mul(3).round()  # ties, and zeros already
    keep = magnitude_mask(w, share, None)
    assert int((~keep).sum()) == round(share * w.numel())
    if bool(keep.any()) and not bool(keep.all()):
        assert float(w.abs()[keep].min()) >= float(w.abs()[~keep].max())


def test_ties_go_by_place_so_that_counts_are_exact() -> None:
    assert keep_highest(torch.zeros(2, 4), 3).tolist() == [[False, False, False, True]] * 2
