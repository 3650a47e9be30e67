"""The choice of codes of types with a codebook, against every entry with every sign, and GPTQ with it."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from ggml import ggml_quantize
from quantizing import lost, problem

from llmc.compress.quantize import steps
from llmc.compress.quantize.gptq import damped, gptq
from llmc.formats import codebooks
from llmc.formats.packing import pack, unpack
from llmc.formats.types import BLOCK_TYPES, BlockType
from llmc.rounding.block_factors import BlockFactors
from llmc.rounding.codebook import STEP, cost, entries
from llmc.rounding.rtn import rtn
from llmc.rounding.search import objective, search_factors

TYPES = [t for t in BLOCK_TYPES.values() if t.codebook is not None]
ALL = pytest.mark.parametrize("qtype", TYPES, ids=lambda t: t.name)
SMALL = ["iq2_xxs", "iq1_m"]  # those of which every choice of 8 columns can be tried
CPU = torch.device("cpu")


def every_choice(qtype: BlockType) -> torch.Tensor:
    """All levels of 8 columns that a type can store, [choices, 8]: slow and obvious."""
    digits = torch.from_numpy(codebooks.table(qtype).digits).long()
    levels = torch.tensor(qtype.levels, dtype=torch.float32)
    if not codebooks.book(qtype).signs:
        return torch.cat([8.0 * (digits - 1) + shift for shift in (-1, 1)])
    signs = torch.tensor([s for s in product((1.0, -1.0), repeat=STEP) if s.count(-1.0) % 2 == 0])
    magnitudes = levels[len(levels) // 2 :][digits]
    return (magnitudes[:, None] * signs).view(-1, STEP)


def targets(qtype: BlockType, rows: int = 60) -> torch.Tensor:
    return torch.randn(rows, STEP, generator=torch.Generator().manual_seed(3)) * max(qtype.levels) / 2.5


def metric() -> torch.Tensor:
    x = torch.randn(20, STEP, generator=torch.Generator().manual_seed(4))
    return x.t() @ x / 20 + 0.1 * torch.eye(STEP)


def storable(levels: torch.Tensor, qtype: BlockType) -> bool:
    """Whether the bytes give these levels [n, 8] again."""
    n = levels.shape[0] * STEP // qtype.block * qtype.block
    codes = entries(qtype, CPU).codes(levels.reshape(-1)[:n].view(-1, qtype.block)).to(torch.uint8)
    parts = codebooks.entries_of(codes.numpy(), qtype)
    return bool((codebooks.codes_of(parts, qtype) == codes.numpy()).all())


@pytest.mark.parametrize("name", SMALL)
def test_the_best_choice_under_a_metric_is_that_of_trying_all(name: str) -> None:
    qtype = BLOCK_TYPES[name]
    x, m, book = targets(qtype), metric(), entries(qtype, CPU)
    choices = every_choice(qtype)
    best = torch.stack([cost(choices - row, m).min() for row in x])
    found = book.choose(x, m)
    ours = cost(found - x, m)
    assert bool((ours >= best * (1 - 1e-4)).all())  # so it is a choice that the type has
    if book.signs:
        plain = book.nearest(x.t()[None], torch.ones(1, len(x)), m.diagonal()[None])[0].t()
        assert float(ours.sum()) < 0.97 * float(cost(plain - x, m).sum())
        assert float(ours.sum()) < 1.1 * float(best.sum())
        assert float(torch.isclose(ours, best, rtol=1e-4).double().mean()) > 0.6
    else:
        torch.testing.assert_close(ours, best, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_the_nearest_choice_is_that_of_trying_all_but_for_the_parity(name: str) -> None:
    qtype = BLOCK_TYPES[name]
    x, book = targets(qtype), entries(qtype, CPU)
    weights = torch.linspace(0.2, 3, STEP)
    best = torch.stack([((every_choice(qtype) - row).square() * weights).sum(1).min() for row in x])
    found = book.nearest(x.t()[None], torch.ones(1, len(x)), weights[None])[0].t()
    ours = ((found - x).square() * weights).sum(1)
    even = (x < 0).sum(1) % 2 == 0
    exact = even if book.signs else torch.ones_like(even)
    torch.testing.assert_close(ours[exact], best[exact], rtol=1e-4, atol=1e-4)
    assert float(ours.sum()) < 1.03 * float(best.sum())


@ALL
def test_choices_can_be_stored_and_a_present_one_only_ever_improves(qtype: BlockType) -> None:
    x, m, book = targets(qtype, 256), metric(), entries(qtype, CPU)
    shift = torch.ones(len(x)) if book.shared > STEP else None
    found = book.choose(x, m, shift=shift)
    assert storable(found, qtype)
    present = book.choose(x.flip(0), m, shift=shift)
    better = book.choose(x, m, present, shift)
    assert storable(better, qtype)
    assert bool((cost(better - x, m) <= cost(present - x, m) * (1 + 1e-5)).all())
    assert float(cost(better - x, m).sum()) < 0.5 * float(cost(present - x, m).sum())


@pytest.mark.parametrize(("name", "most"), [("iq3_s", 1.2), ("iq3_xxs", 1.2), ("iq2_s", 1.25), ("iq2_xs", 1.25),
                                            ("iq2_xxs", 1.25), ("iq1_m", 1.45)])
def test_the_cells_of_the_search_are_nearly_as_good(name: str, most: float) -> None:
    qtype = BLOCK_TYPES[name]
    x, book = targets(qtype, 500), entries(qtype, CPU)
    weights, scale = torch.ones(1, STEP), torch.ones(1, len(x))
    exact, rough = (book.nearest(x.t()[None], scale, weights, roughly=r)[0].t() for r in (False, True))
    assert float((exact - x).square().sum()) <= float((rough - x).square().sum()) < most * float((exact - x).square().sum())


def blocks_of(h: torch.Tensor) -> torch.Tensor:
    """h with nothing but the blocks of 8 columns on its diagonal."""
    return torch.block_diag(*(h[i : i + STEP, i : i + STEP] for i in range(0, len(h), STEP)))


@ALL
def test_a_step_of_the_sweep_is_the_choice_under_its_own_part_of_the_hessian(qtype: BlockType) -> None:
    """Without correlations between steps, no error moves another step: each is one choice, which `choose` is tested for."""
    w, h = problem(6, 256, tokens=600)
    wt, h = w.t().contiguous(), blocks_of(h)
    ready = damped(h, 0.01, step=STEP)
    factors = search_factors(wt, h, None, qtype)
    assert isinstance(factors, BlockFactors)
    assert ready.factor is not None
    assert ready.order is not None
    assert torch.equal(ready.order.view(-1, STEP) % STEP, torch.arange(STEP).expand(32, STEP))
    codes = steps.sweep(wt[ready.order].clone(), ready.factor, factors, ready.order)[torch.argsort(ready.order)]
    choices = steps.Choices(factors)
    for step in range(32):
        columns = slice(step * STEP, (step + 1) * STEP)
        own = h[columns, columns]
        expected = choices.choose(step, wt[columns], own / own.diagonal().mean())[1]
        found = factors.values(codes)[columns]
        torch.testing.assert_close(cost((found - wt[columns]).t(), own), cost((expected - wt[columns]).t(), own), rtol=1e-3,
                                   atol=1e-3)


@ALL
def test_gptq_loses_less_than_rounding_with_the_same_scales_and_descent_never_raises_the_loss(qtype: BlockType) -> None:
    w, h = problem(16, 512, tokens=900)
    wt = w.t().contiguous()
    ready = damped(h, 0.01, step=STEP)
    assert ready.factor is not None
    assert ready.order is not None
    back = torch.argsort(ready.order)
    factors = search_factors(wt, h, ready.factor[:, back], qtype)
    assert isinstance(factors, BlockFactors)
    codes = steps.sweep(wt[ready.order].clone(), ready.factor, factors, ready.order)[back]
    rounded = objective(factors.values(factors.nearest(wt)) - wt, h)
    values = factors.values(codes)
    swept = objective(values - wt, h)
    assert float(swept.sum()) < 0.8 * float(rounded.sum())
    gradient = h @ (values - wt)
    for _ in range(3):
        before = (gradient * (values - wt)).sum(0)
        steps.descend(h, codes, values, gradient, factors)
        assert bool(((gradient * (values - wt)).sum(0) <= before * (1 + 1e-3)).all())
        torch.testing.assert_close(values, factors.values(codes), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, h @ (values - wt), rtol=1e-3, atol=1e-2 * float(gradient.abs().max()))
    assert float((gradient * (values - wt)).sum()) < float(swept.sum())
    pack(factors.tensor(codes))


@ALL
def test_weighted_rounding_loses_less_than_llama_cpps_own(qtype: BlockType) -> None:
    g = torch.Generator().manual_seed(1)
    w, importance = torch.randn(12, 512, generator=g) * 0.02, torch.randn(512, generator=g).exp()
    theirs = unpack(ggml_quantize(w.numpy(), qtype, importance.numpy()), qtype).dequantize()
    ours = rtn(w, qtype, importance).dequantize()
    assert float(((ours - w).square() * importance).sum()) < 0.95 * float(((theirs - w).square() * importance).sum())


@ALL
def test_rows_and_blocks_of_zeros_are_zero_and_change_no_others(qtype: BlockType) -> None:
    w, h = problem(8, 512, tokens=900)
    w[2], w[5, :256] = 0, 0
    result = gptq(w, h.clone(), qtype)
    assert result.weight is not None
    q = unpack(pack(result.weight), qtype).dequantize()
    assert torch.equal(q, result.weight.dequantize())
    assert not bool(q[2].any())
    assert lost(q, w, h) < 0.6 * float(objective(w.t(), h).sum())
    plain = rtn(w, qtype).dequantize()
    assert not bool(plain[2].any())
    assert not bool(plain[5, :256].any())


def test_masks_are_refused_by_name() -> None:
    w, h = problem(4, 256, tokens=300)
    with pytest.raises(ValueError, match="iq2_xs has no code for zero"):
        gptq(w, h, BLOCK_TYPES["iq2_xs"], keep=w > 0)
