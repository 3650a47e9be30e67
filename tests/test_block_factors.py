"""GPTQ on GGUF's block types."""

from __future__ import annotations

import pytest
import torch
from ggml import ggml_quantize
from hypothesis import given
from hypothesis import strategies as st
from quantizing import lost, problem

from llmc.compress.quantize.gptq import descend, gptq, sweep
from llmc.formats.packing import pack, unpack
from llmc.formats.types import BLOCK_TYPES, BlockTensor, BlockType
from llmc.rounding.block_factors import BlockFactors, search_blocks
from llmc.rounding.levels import levels_of
from llmc.rounding.rtn import rtn

ALL = pytest.mark.parametrize("qtype", BLOCK_TYPES.values(), ids=lambda g: g.name)


PLAIN = pytest.mark.parametrize("qtype", [t for t in BLOCK_TYPES.values() if t.codebook is None], ids=lambda g: g.name)


def found(qtype: BlockType, n: int = 512, out: int = 12) -> tuple[torch.Tensor, torch.Tensor, BlockFactors]:
    w, h = problem(out, n, tokens=900)
    wt = w.t().contiguous()
    return wt, h, search_blocks(wt, h, None, qtype)


@ALL
def test_factors_are_stored_without_loss(qtype: BlockType) -> None:
    w, _, factors = found(qtype)
    codes = factors.nearest(w)
    stored = factors.tensor(codes)
    assert torch.equal(stored.dequantize().t(), factors.values(codes))
    again = unpack(pack(stored), qtype)
    assert torch.equal(again.dequantize(), stored.dequantize())


@given(st.one_of(st.just(BLOCK_TYPES["iq4_nl"].levels),
                 st.lists(st.integers(-300, 300), min_size=2, max_size=20, unique=True).map(lambda x: tuple(sorted(x)))),
       st.lists(st.floats(-1e6, 1e6, width=32), max_size=20))
def test_the_nearest_level_is_that_of_a_search(levels: tuple[int, ...], others: list[float]) -> None:
    values = torch.tensor(levels, dtype=torch.float32)
    borders = (values[1:] + values[:-1]) / 2
    ends = torch.tensor([torch.inf, -torch.inf])
    x = torch.cat([values, borders, *(torch.nextafter(borders, end.expand_as(borders)) for end in ends), ends,
                   torch.tensor(others)])
    table = levels_of(levels, x.dtype, x.device)
    entries = table.entries(x * 2)
    expected = torch.bucketize(x, borders)
    assert torch.equal(torch.take(table.codes, entries), expected.float())
    assert torch.equal(torch.take(table.values, entries), values[expected])


@pytest.mark.parametrize("name", ["iq4_nl", "iq4_xs"])
def test_columns_on_a_border_take_the_lower_level(name: str) -> None:
    """As the search over borders that the look-up stands for: bit for bit, for targets on and beside every border."""
    levels = torch.tensor(BLOCK_TYPES[name].levels, dtype=torch.float32)
    borders = (levels[1:] + levels[:-1]) / 2
    scale = torch.tensor([[0.25, -3.0, 0.0171]]).repeat_interleave(3 * len(borders), 1)
    near = torch.cat([borders, torch.nextafter(borders, borders + 1), torch.nextafter(borders, borders - 1)])
    target = near.repeat(3) * scale[0]
    factors = BlockFactors(BLOCK_TYPES[name], scale, None, None, None)
    code = torch.empty_like(target)
    value = factors.columns().round(0, target, code)
    expected = torch.bucketize(target * (1 / scale[0]), borders)
    assert torch.equal(code, expected.float())
    assert torch.equal(value, levels[expected] * scale[0])


@PLAIN
def test_columns_round_to_the_nearest_value(qtype: BlockType) -> None:
    w, _, factors = found(qtype)
    columns, codes = factors.columns(), torch.empty_like(w)
    values = torch.stack([columns.round(i, w[i], codes[i]) for i in range(w.shape[0])])
    assert torch.equal(values, factors.values(codes))
    possible = torch.tensor(qtype.levels).float()[:, None, None] * factors.group_scales() + factors.group_lows()
    best = (possible.repeat_interleave(qtype.group, 1) - w).abs().amin(0)
    torch.testing.assert_close((values - w).abs(), best, rtol=1e-4, atol=1e-5)


@ALL
def test_plain_rounding_loses_no_more_than_llama_cpps_own(qtype: BlockType) -> None:
    w = torch.randn(16, 512, generator=torch.Generator().manual_seed(1))
    ours, theirs = rtn(w, qtype).dequantize(), unpack(ggml_quantize(w.numpy(), qtype), qtype).dequantize()
    assert float((ours - w).square().sum()) <= 1.01 * float((theirs - w).square().sum())


@ALL
def test_gptq_beats_rtn(qtype: BlockType) -> None:
    w, h = problem(24, 512, tokens=900)
    result = gptq(w, h, qtype)
    assert isinstance(result.weight, BlockTensor)
    assert lost(result.weight.dequantize(), w, h) < 0.7 * lost(rtn(w, qtype).dequantize(), w, h)
    assert float(result.error.sum()) == pytest.approx(lost(result.weight.dequantize(), w, h), rel=1e-3)


@ALL
def test_descent_on_the_groups_integers_only_ever_helps(qtype: BlockType) -> None:
    w, h, factors = found(qtype)
    codes = factors.nearest(w)
    values = factors.values(codes)
    gradient = h @ (values - w)
    before = (gradient * (values - w)).sum(0)
    moved = factors.descend(h, codes, values, gradient)
    torch.testing.assert_close(values, moved.values(codes), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient, h @ (moved.values(codes) - w), rtol=1e-3, atol=1e-2 * float(gradient.abs().max()))
    after = (gradient * (values - w)).sum(0)
    assert bool((after <= before * (1 + 1e-4)).all())
    if qtype.scale_range is not None:
        assert float(after.sum()) < float(before.sum())


def test_least_squares_over_scale_and_minimum_equals_the_explicit_regression() -> None:
    qtype = BLOCK_TYPES["q2_k"]
    w, h = problem(2, 512, tokens=900)
    wt, h = w.t().double().contiguous(), h.double() + 1e-3 * h.double().diagonal().mean() * torch.eye(512)
    start = search_blocks(wt.float(), h.float(), None, qtype)
    wide = BlockFactors(qtype, *(x if x is None else x.double() for x in (start.d, start.m, start.scales, start.mins)))
    codes = wide.nearest(wt)
    refit = wide.refit(h, codes, h @ (wide.values(codes) - wt))
    units = wide._units(codes)
    root = torch.linalg.cholesky(h, upper=True)
    for row in range(2):
        design = torch.zeros(512, 4, dtype=torch.float64)
        for block in range(2):
            part = slice(256 * block, 256 * (block + 1))
            design[part, block], design[part, 2 + block] = units[0][part, row], units[1][part, row]
        best = torch.linalg.lstsq(root @ design, root @ wt[:, row : row + 1]).solution[:, 0]
        assert refit.m is not None
        torch.testing.assert_close(torch.cat([refit.d[:, row], refit.m[:, row]]).double(), best, rtol=5e-3, atol=1e-5)


def test_sweep_and_descent_know_levels_that_are_not_even() -> None:
    w, _, factors = found(BLOCK_TYPES["iq4_nl"], n=64)
    codes = sweep(w.clone(), torch.eye(64), factors.columns())
    assert torch.equal(codes, factors.nearest(w))  # nothing to compensate under a unit Hessian
    values = factors.values(codes)
    gradient = values - w
    descend(torch.eye(64), codes, values, gradient, factors.columns())
    assert torch.equal(codes, factors.nearest(w))
