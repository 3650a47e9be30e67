"""SparseGPT against optimal brain surgery done the slow way."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantizing import lost, problem

from llmc.compress.prune.masks import magnitude_mask, wanda_mask
from llmc.compress.prune.sparsegpt import BLOCK, reconstruct, sweep
from llmc.compress.quantize.gptq import inverse_factor


def factored(h: torch.Tensor) -> torch.Tensor:
    factor = inverse_factor(h)
    assert factor is not None
    return factor


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
