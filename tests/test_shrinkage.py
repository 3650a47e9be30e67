"""Statistics over little text are shrunk towards their diagonal, by how much the sequences of the text differ."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from quantizing import settings
from tiny import build

from llmc.compress import shrinkage
from llmc.compress.quantize.gptq import gptq
from llmc.compress.quantize.run import quantize
from llmc.compress.shrinkage import MOST, Variation, restore, shrink
from llmc.formats.types import IntegerType
from llmc.rounding.search import objective

INT4 = IntegerType(4, 32)


def text(sequences: int, width: int, seed: int, length: int = 32, mixed: torch.Tensor | None = None) -> torch.Tensor:
    """Inputs [sequences, length, width]: noise times a mixing matrix, with a part that a whole sequence shares."""
    g = torch.Generator().manual_seed(seed)
    own = torch.randn(sequences, length, width, generator=g) + torch.randn(sequences, 1, width, generator=g)
    return own if mixed is None else own @ mixed


def gram(x: torch.Tensor) -> torch.Tensor:
    rows = x.flatten(0, 1)
    return rows.t() @ rows


def share_of(x: torch.Tensor, batch: int = 3) -> float:
    variation = Variation()
    for part in x.split(batch):
        variation.add(part)
    return variation.share(gram(x))


@pytest.mark.parametrize("width", [48, 64, 160])
def test_the_share_is_the_relative_standard_error_of_the_entries(width: int) -> None:
    x = text(7, width, 0)
    sums = torch.stack([gram(row[None]) for row in x]).double()
    rows = shrinkage.picked(width)
    off = ~torch.eye(width, dtype=torch.bool)[rows]
    parts = sums[:, rows][:, off]
    whole = parts.sum(0)
    variance = len(x) * parts.var(0)  # of a sum of so many
    assert share_of(x) == pytest.approx(min(MOST, math.sqrt(float(variance.sum() / whole.square().sum()))), rel=1e-4)


def test_batches_and_workers_do_not_change_the_share() -> None:
    x = text(8, 96, 1)
    first, second = Variation(), Variation()
    first.add(x[:3])
    second.add(x[3:])
    first.total(second)
    assert first.share(gram(x)) == pytest.approx(share_of(x, 8), rel=1e-4)


def test_more_text_needs_less_shrinking_and_one_sequence_says_nothing() -> None:
    mixed = torch.randn(96, 96, generator=torch.Generator().manual_seed(3))
    shares = [share_of(text(n, 96, 2, mixed=mixed)) for n in (4, 16, 64, 256)]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < shares[1] / 2
    assert share_of(text(1, 96, 2)) == MOST
    assert share_of(torch.zeros(4, 8, 96)) == 0


def test_shrinking_is_undone() -> None:
    before = gram(text(4, 64, 4))
    h = before.clone()
    shrink(h, 0.9)
    assert torch.equal(h.diagonal(), before.diagonal())
    assert torch.allclose(h[0, 1:], before[0, 1:] * 0.1)
    restore(h, 0.9, before.diagonal().clone())
    assert torch.allclose(h, before, rtol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.4, MOST])
def test_the_error_is_that_under_the_given_hessian(share: float) -> None:
    w = torch.randn(24, 64, generator=torch.Generator().manual_seed(5))
    h = gram(text(6, 64, 6))
    given = h.clone()
    found = gptq(w, h, INT4, share=share)
    assert found.weight is not None
    assert torch.allclose(h, given, rtol=1e-4)
    expected = objective((found.weight.dequantize() - w).t().contiguous(), given)
    assert torch.allclose(found.error, expected, rtol=2e-3, atol=1e-3 * float(expected.mean()))


def test_other_text_loses_less_than_without_shrinking_and_than_with_the_diagonal_alone() -> None:
    g = torch.Generator().manual_seed(7)
    mixed = torch.randn(128, 128, generator=g) * torch.logspace(0, -0.3, 128)[:, None]
    w = torch.randn(64, 128, generator=g)

    def inputs(sequences: int, seed: int) -> torch.Tensor:
        return torch.randn(sequences, 16, 128, generator=torch.Generator().manual_seed(seed)) @ mixed

    other = gram(inputs(400, 8))

    def lost(sequences: int, share: float | None) -> float:
        x = inputs(sequences, 9)
        q = gptq(w, gram(x), INT4, share=share_of(x) if share is None else share).weight
        assert q is not None
        return float(objective((q.dequantize() - w).t().contiguous(), other).sum())

    assert lost(4, None) < 0.7 * lost(4, 0.0)  # half as many tokens as columns
    for sequences in (4, 20, 200):
        assert lost(sequences, None) < 0.9 * lost(sequences, MOST)
    assert lost(200, None) < 1.05 * lost(200, 0.0)


def test_one_sequence_is_said_and_each_linears_share_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, text = build("llama", tmp_path / "m"), tmp_path / "t.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    for samples in (1, 4):
        out = tmp_path / f"q{samples}"
        quantize(base, settings(text, out, samples=samples, threads=1))
        assert ("one calibration sequence says nothing about others" in capsys.readouterr().err) == (samples == 1)
        assert ('"shrunk": 0.99' in (out / "llmc.json").read_text()) == (samples == 1)
