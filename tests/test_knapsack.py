"""The knapsack behind a budget against all choices tried."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from llmc.compress.quantize import knapsack
from llmc.compress.quantize.knapsack import Frontier, Option

OPTIONS = st.lists(st.tuples(st.integers(1, 40), st.floats(0, 1)), min_size=1, max_size=4)
ITEMS = st.lists(OPTIONS, min_size=1, max_size=5)


def items_of(raw: list[list[tuple[int, float]]], step: int = 1) -> dict[str, list[Option]]:
    return {str(i): [Option(str(j), step * size, loss) for j, (size, loss) in enumerate(options)]
            for i, options in enumerate(raw)}


def brute_force(items: dict[str, list[Option]]) -> list[tuple[int, float]]:
    """(bytes, loss) of every choice."""
    return [(sum(o.nbytes for o in choice), sum(o.loss for o in choice)) for choice in itertools.product(*items.values())]


def totals(chosen: dict[str, Option]) -> tuple[int, float]:
    return sum(o.nbytes for o in chosen.values()), sum(o.loss for o in chosen.values())


@hypothesis_settings(max_examples=60, deadline=None)
@given(ITEMS, st.integers(1, 7), st.integers(0, 1500), st.floats(0, 5))
def test_the_choice_is_the_best_of_all(raw: Any, step: int, budget: int, loss: float) -> None:
    items = items_of(raw, step)
    frontier, every = Frontier(items), brute_force(items)
    allowed = [x for x in every if x[0] <= budget]
    chosen = frontier.within(budget)
    assert (chosen is None) == (not allowed)
    if chosen is not None:
        assert totals(chosen)[0] <= budget
        assert totals(chosen)[1] == pytest.approx(min(x[1] for x in allowed), abs=1e-9)
    good = [x for x in every if x[1] <= loss - 1e-9]
    small = frontier.reaching(loss)
    if good:
        assert small is not None
        assert totals(small)[0] <= min(x[0] for x in good)
    if small is not None:
        assert totals(small)[1] <= loss + 1e-9


@hypothesis_settings(max_examples=50, deadline=None)
@given(ITEMS, st.integers(0, 300))
def test_a_coarse_table_keeps_the_budget_and_is_the_best_of_the_rounded(raw: Any, budget: int) -> None:
    before, knapsack.STEPS = knapsack.STEPS, 20
    try:
        items = items_of(raw)
        frontier = Frontier(items)
    finally:
        knapsack.STEPS = before
    chosen = frontier.within(budget)
    if chosen is not None:
        assert totals(chosen)[0] <= budget
        tight = [x for x in brute_force(items) if x[0] <= budget - len(items) * (frontier.unit - 1)]
        if tight:  # whatever leaves room for the rounding is no better
            assert totals(chosen)[1] <= min(x[1] for x in tight) + 1e-9


def test_more_budget_is_never_worse() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes, losses = (torch.rand(30, 6, generator=generator) for _ in "ab")
    frontier = Frontier({str(i): [Option(str(j), int(1000 * sizes[i, j]) + 1, float(losses[i, j])) for j in range(6)]
                         for i in range(30)})
    found = [totals(c)[1] for budget in range(frontier.least, frontier.most + 50, 37) if (c := frontier.within(budget))]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(found))
