"""Masks: SparseGPT, Wanda and patterns against slow references, and zeros that later passes keep."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gptq import lost, problem

from llmc.compress.prune.masks import keep_highest, keep_pattern, magnitude_mask, wanda_mask
from llmc.compress.prune.sparsegpt import BLOCK, reconstruct, sweep
from llmc.compress.quantize.assignment import type_called
from llmc.compress.quantize.gptq import gptq, inverse_factor
from llmc.formats.types import BLOCK_TYPES, IntegerType
from llmc.rounding.rtn import rtn


def factored(h: torch.Tensor) -> torch.Tensor:
    factor = inverse_factor(h)
    assert factor is not None
    return factor


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


@pytest.mark.parametrize("pattern", [None, "2:4", "4:8"])
def test_sparsegpt_equals_optimal_brain_surgery_done_the_slow_way(pattern: str | None) -> None:
    """Reference: columns from left to right; a weight's saliency is the least error of removing it given all columns to its
    left are fixed, and what is left of a row is re-solved after every column. By explicit inverses, in float64."""
    n, out = BLOCK + 40, 5  # a whole block and a part
    w, h = problem(out, n)
    w, h = w.double(), h.double() + torch.eye(n) * 0.01 * h.diagonal().mean()
    left, expected = w.clone(), torch.ones(out, n, dtype=torch.bool)
    of = int(pattern[-1]) if pattern else BLOCK
    for j in range(n):
        if j % of == 0:
            end = min(j + of, n)
            saliency = torch.empty(out, end - j, dtype=torch.float64)
            for k in range(j, end):
                inverse = torch.linalg.inv(h[k:, k:])[0, 0]
                saliency[:, k - j] = left[:, k] ** 2 / inverse
            if pattern:
                for row in range(out):
                    expected[row, j + saliency[row].argsort()[: of // 2]] = False
            else:
                worst = saliency.flatten().argsort()[: round(0.5 * end * out) - round(0.5 * j * out)]
                expected[worst // (end - j), j + worst % (end - j)] = False
        error = left[:, j] * ~expected[:, j]
        left[:, j] -= error
        if j + 1 < n:
            left[:, j + 1 :] += error[:, None] * torch.linalg.solve(h[j + 1 :, j + 1 :], h[j + 1 :, j])
    swept = w.t().contiguous()
    keep = sweep(swept, factored(h), 0.5, pattern)
    assert torch.equal(keep.t(), expected)
    torch.testing.assert_close(swept.t(), left)
    assert bool((swept[~keep] == 0).all())
    assert int((~keep).sum()) == out * n // 2


def test_reconstruction_ends_at_the_least_squares_solution_of_the_mask() -> None:
    w, h = problem(6, 40)
    w, h = w.double(), h.double() + torch.eye(40) * 0.01 * h.diagonal().mean()
    keep = torch.rand(6, 40, generator=torch.Generator().manual_seed(3)) > 0.5
    target = w.t().contiguous()
    found = reconstruct(target.clone(), target, keep.t(), h, steps=200)
    for row in range(6):
        stays = keep[row].nonzero().flatten()
        best = torch.linalg.solve(h[stays][:, stays], h[stays] @ w[row])
        torch.testing.assert_close(found[stays, row], best, rtol=1e-6, atol=1e-8)
    assert bool((found[~keep.t()] == 0).all())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 9999), out=st.integers(2, 9), runs=st.integers(2, 20), tokens=st.integers(2, 200))
def test_every_step_loses_less_than_the_one_before(seed: int, out: int, runs: int, tokens: int) -> None:
    """Cutting by the sweep's mask > the sweep > reconstructed after it, on the same mask."""
    w, h = problem(out, 8 * runs, seed, tokens)
    h += torch.eye(8 * runs) * 0.01 * h.diagonal().mean()
    swept = w.t().contiguous()
    keep = sweep(swept, factored(h), 0.5, None)
    errors = [lost(x.t(), w, h) for x in (w.t() * keep, reconstruct(w.t() * keep, w.t(), keep, h),
                                          reconstruct(swept, w.t(), keep, h))]
    assert errors[2] <= lost(swept.t(), w, h) * (1 + 1e-4)
    assert errors[1] <= errors[0] * (1 + 1e-4)


def test_sparsegpt_loses_less_than_wanda_and_wanda_less_than_magnitude() -> None:
    w, h = problem(48, 256, tokens=2000)
    h += torch.eye(256) * 0.01 * h.diagonal().mean()
    swept = w.t().contiguous()
    sweep(swept, factored(h), 0.5, None)
    masks = wanda_mask(w, h.diagonal(), 0.5, None), magnitude_mask(w, 0.5, None)
    errors = [lost(q, w, h) for q in (swept.t(), *(w * mask for mask in masks))]
    assert all(a < b for a, b in itertools.pairwise(errors))


def test_ties_go_by_place_so_that_counts_are_exact() -> None:
    assert keep_highest(torch.zeros(2, 4), 3).tolist() == [[False, False, False, True]] * 2


# ------------------------------------------------------------------------------------------------- zeros when quantized

KEEPING = [IntegerType(4, 32), IntegerType(8, 64), IntegerType(4, 32, False), IntegerType(8, 32, False),
           *(type_called(name) for name, qtype in BLOCK_TYPES.items() if qtype.holds_zero)]


def test_which_types_have_a_code_for_zero() -> None:
    assert [name for name, qtype in BLOCK_TYPES.items() if qtype.holds_zero] == ["q4_0", "q5_0", "q8_0", "q3_k", "q6_k"]
    for qtype in KEEPING:
        zero = rtn(torch.zeros(1, 256).index_fill_(1, torch.tensor([3, 40, 100, 200]), 1.7), qtype).dequantize()
        assert int((zero == 0).sum()) == 252


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 9999), type=st.sampled_from(KEEPING), share=st.sampled_from([0.3, 0.5, 0.8]),
       drifted=st.booleans())
def test_zeros_stay_and_the_others_make_up_for_it(seed: int, qtype: IntegerType, share: float, drifted: bool) -> None:
    w, h = problem(6, 256, seed)
    w *= magnitude_mask(w, share, None)
    keep = w != 0
    target = w + 0.01 * torch.randn(w.shape, generator=torch.Generator().manual_seed(seed)) if drifted else w
    damped = h.clone()
    result = gptq(target, damped, qtype, keep=keep)
    assert result.weight is not None
    made, plain = result.weight.dequantize(), rtn(w, qtype).dequantize()
    assert bool((made[~keep] == 0).all())
    assert bool((plain[~keep] == 0).all())
    assert lost(made, target, damped) < lost(plain, target, damped)
    assert float(result.error.sum()) == pytest.approx(lost(made, target, damped), rel=1e-3)


def test_without_a_mask_gptq_makes_the_same_codes_as_with_one_that_keeps_all() -> None:
    w, h = problem(8, 128)
    plain, all_kept = (gptq(w, h.clone(), IntegerType(4, 32), keep=keep) for keep in (None, torch.ones(8, 128, dtype=torch.bool)))
    assert plain.weight is not None
    assert all_kept.weight is not None
    assert torch.equal(plain.weight.codes, all_kept.weight.codes)
    assert torch.equal(plain.weight.scales, all_kept.weight.scales)
