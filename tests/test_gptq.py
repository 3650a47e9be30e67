"""GPTQ and its parts against slow and obvious references."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantizing import lost, problem

from llmc.compress.quantize.gptq import damped, descend, gptq, inverse_factor, sweep
from llmc.formats.types import IntegerType
from llmc.rounding.rtn import rtn
from llmc.rounding.scales import Columns, Scales, search
from llmc.rounding.search import objective

TYPES = [IntegerType(4, 32), IntegerType(8, 32), IntegerType(4, 64), IntegerType(4, 32, False), IntegerType(8, 32, False)]


def test_inverse_factor_is_the_upper_cholesky_factor_of_the_inverse() -> None:
    _, h = problem(1, 48)
    h = h.double() + torch.eye(48)
    u = inverse_factor(h)
    assert u is not None
    torch.testing.assert_close(u, torch.linalg.cholesky(torch.linalg.inv(h), upper=True))


def test_inverse_factor_refuses_what_is_not_positive_definite() -> None:
    assert inverse_factor(torch.diag(torch.tensor([1.0, -1.0, 2.0]))) is None


def test_sweep_equals_optimal_brain_quantization_done_the_slow_way() -> None:
    """Reference: after each column is rounded, the columns left are re-solved with the inverse of their own Hessian."""
    n, out = 150, 5  # more than two blocks
    w, h = problem(out, n)
    w, h = w.double(), h.double() + torch.eye(n) * 0.01 * h.diagonal().mean()
    scale, zero = torch.full((n, out), 0.3).double(), torch.full((n, out), 8.0).double()
    left, expected = w.clone(), torch.empty(n, out).double()
    for j in range(n):
        expected[j] = (left[:, j] / 0.3 + 8).round().clamp(0, 15)
        error = left[:, j] - (expected[j] - 8) * 0.3
        if j + 1 < n:
            # minimise over the rest r: (e, r) H (e, r)^T with e fixed  ->  r = -e H_jr H_rr^-1
            rest = torch.linalg.solve(h[j + 1 :, j + 1 :], h[j + 1 :, j])
            left[:, j + 1 :] += error[:, None] * rest
    factor = inverse_factor(h)
    assert factor is not None
    columns = Columns(scale, -8 * scale, zero, torch.arange(n), 15)
    assert torch.equal(sweep(w.t().contiguous(), factor, columns), expected)


def test_scale_search_weighs_a_group_by_what_is_left_when_the_others_compensate() -> None:
    """The Schur complement block is the smallest error over all values of the other columns."""
    _, h = problem(1, 64)
    h = h.double() + torch.eye(64)
    d = torch.randn(32, dtype=torch.float64)
    others = -torch.linalg.solve(h[32:, 32:], h[32:, :32] @ d)
    best = torch.cat([d, others])
    factor = inverse_factor(h)
    assert factor is not None
    block = torch.linalg.inv(factor[:, :32].t() @ factor[:, :32])
    torch.testing.assert_close(best @ h @ best, d @ block @ d)


def test_scale_search_finds_the_scale_of_weights_that_lie_on_a_type() -> None:
    codes = torch.randint(0, 16, (64, 7), dtype=torch.float32)
    codes[::32] = 0  # the full range is used
    scale = (torch.rand(2, 7) + 0.5).half().float()
    w = (codes - 8) * scale.repeat_interleave(32, 0)
    found = search(w, torch.eye(64), None, IntegerType(4, 32))
    assert torch.equal(found.values(found.nearest(w)), w)


def test_least_squares_equals_the_explicit_regression() -> None:
    w, h = problem(3, 64)
    h = h.double() + 1e-3 * h.double().diagonal().mean() * torch.eye(64)
    wt = w.t().double().contiguous()
    scales = Scales(IntegerType(4, 32), torch.full((2, 3), 0.31).double(), torch.full((2, 3), 8.0).double())
    codes = scales.nearest(wt)
    root = torch.linalg.cholesky(h, upper=True)
    found = scales.refit(h, codes, h @ (scales.values(codes) - wt))
    for row in range(3):
        design = torch.zeros(64, 2, dtype=torch.float64)
        design[:32, 0], design[32:, 1] = codes[:32, row] - 8, codes[32:, row] - 8
        best = torch.linalg.lstsq(root @ design, root @ wt[:, row : row + 1]).solution[:, 0]
        torch.testing.assert_close(found.scale[:, row].double(), best, rtol=2e-3, atol=0)  # rounded to fp16


def test_coordinate_descent_ends_where_no_single_code_can_improve() -> None:
    w, h = problem(4, 32, tokens=60)
    wt, h = w.t().double().contiguous(), h.double() + torch.eye(32)
    scales = Scales(IntegerType(4, 32), torch.full((1, 4), 0.4).double(), torch.full((1, 4), 8.0).double())
    codes = scales.nearest(wt)
    values = scales.values(codes)
    gradient = h @ (values - wt)
    for _ in range(50):
        descend(h, codes, values, gradient, scales.columns())
    torch.testing.assert_close(values, scales.values(codes))
    torch.testing.assert_close(gradient, h @ (values - wt))
    error = objective((codes - 8) * 0.4 - wt, h)
    for column in range(32):
        for step in (-1, 1):
            other = codes.clone()
            other[column] = (other[column] + step).clamp(0, 15)
            assert bool((objective((other - 8) * 0.4 - wt, h) >= error - 1e-9).all())


@pytest.mark.parametrize("qtype", TYPES, ids=lambda g: g.name)
def test_gptq_beats_rtn_and_stays_on_the_type(qtype: IntegerType) -> None:
    w, h = problem(24, 128)
    result = gptq(w, h.clone(), qtype)
    assert result.weight is not None
    q = result.weight
    assert int(q.codes.max()) <= qtype.max_code
    assert q.scales.dtype == torch.float16
    assert (q.zeros is None) == qtype.symmetric
    assert lost(q.dequantize(), w, h) < 0.7 * lost(rtn(w, qtype).dequantize(), w, h)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), out=st.integers(2, 9), groups=st.integers(1, 4), tokens=st.integers(2, 200))
def test_gptq_never_loses_to_rtn_on_the_hessian_it_was_given(seed: int, out: int, groups: int, tokens: int) -> None:
    """Nothing in GPTQ guarantees it: a single row on a single token was seen to lose by 1 % (once in 1500 draws). From two
    rows and two tokens on, 4000 draws showed none."""
    w, h = problem(out, 32 * groups, seed, tokens)
    result = gptq(w, h, IntegerType(4, 32))
    assert result.weight is not None
    nearest, used = rtn(w, IntegerType(4, 32)).dequantize(), h.clone()
    damped(used, 0.01)
    assert lost(result.weight.dequantize(), w, used) <= lost(nearest, w, used) * (1 + 1e-4)


@pytest.mark.parametrize("damp", [0.01, 0.3])
@pytest.mark.parametrize("dead", [False, True])
def test_reported_error_is_the_error_of_what_ships(damp: float, dead: bool) -> None:
    """Under the Hessian that was given, in float64, one row at a time; the damping and dead columns add nothing."""
    w, h = problem(8, 96)
    if dead:
        h[5], h[:, 5] = 0, 0
    given = h.clone()
    result = gptq(w, h, IntegerType(4, 32), damp)
    assert torch.equal(h, given)
    assert result.weight is not None
    moved = (result.weight.dequantize() - w).double().numpy()
    for row in range(8):
        for vector, reported in ((moved[row], result.error[row]), (w[row].double().numpy(), result.energy[row])):
            slow = sum(vector[i] * float(given[i, j]) * vector[j] for i in range(96) for j in range(96))
            assert float(reported) == pytest.approx(slow, rel=1e-3)
    damped(used := given.clone(), damp)
    assert float(result.error.sum()) < 0.99 * lost(result.weight.dequantize(), w, used)


def test_refinement_only_ever_helps() -> None:
    w, h = problem(16, 128)
    damped(used := h.clone(), 0.01)  # what it minimizes
    found = [gptq(w, h, IntegerType(4, 32), refinements=r).weight for r in (0, 1, 2, 4)]
    errors = [objective((q.dequantize() - w).t(), used) for q in found if q is not None]
    assert len(errors) == 4
    for before, after in itertools.pairwise(errors):
        assert bool((after <= before * (1 + 1e-5)).all())


def test_dead_columns_are_rounded_not_zeroed() -> None:
    w, h = problem(8, 64)
    h[5], h[:, 5] = 0, 0
    result = gptq(w, h, IntegerType(4, 32))
    assert result.dead == 1
    assert result.weight is not None
    assert float((result.weight.dequantize()[:, 5] - w[:, 5]).abs().max()) < 0.6 * float(w.abs().max()) / 8


def test_damping_is_raised_until_the_hessian_can_be_factored_and_said() -> None:
    w, h = problem(4, 64)
    h[3, 3] -= 1.5 * h[3, 3]  # indefinite by more than 1 % of the mean
    h[3, 3] = -0.05 * h.diagonal().mean()
    result = gptq(w, h, IntegerType(4, 32))
    assert result.events
    assert result.damp > 0.01


def test_a_hessian_beyond_repair_gives_no_weight() -> None:
    w, h = problem(4, 64)
    result = gptq(w, -h, IntegerType(4, 32))
    assert result.weight is None


def test_zero_weights_stay_zero() -> None:
    _, h = problem(4, 64)
    result = gptq(torch.zeros(4, 64), h, IntegerType(4, 32))
    assert result.weight is not None
    assert bool((result.weight.dequantize() == 0).all())
