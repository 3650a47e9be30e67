"""The losses of healing and distillation against autograd's own operators."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from llmc.compress.teaching import loss

OBJECTIVES = st.builds(loss.Objective, st.booleans(), st.floats(0.5, 4), st.sampled_from([0.0, 0.3, 1.0]))


def by_definition(objective: loss.Objective, ours: torch.Tensor, theirs: torch.Tensor, nexts: torch.Tensor) -> torch.Tensor:
    """The sum over rows, in autograd's own operators."""
    t, ce = objective.temperature, objective.ce_weight
    q, p = log_softmax(ours / t, -1), log_softmax(theirs / t, -1)
    between = kl_div(p, q, reduction="sum", log_target=True) if objective.reverse else kl_div(
        q, p, reduction="sum", log_target=True)
    return (1 - ce) * t * t * between + ce * cross_entropy(ours, nexts, reduction="sum")


@settings(deadline=None, max_examples=40)
@given(OBJECTIVES, st.integers(0, 3), st.integers(0, 10_000))
def test_loss_and_gradient_are_those_of_autograd_also_with_rows_of_padding(
    objective: loss.Objective, padding: int, seed: int,
) -> None:
    g = torch.Generator().manual_seed(seed)
    ours = (torch.randn(5, 30 + padding, generator=g) * 3).requires_grad_()
    theirs, nexts = torch.randn(5, 30, generator=g) * 3, torch.randint(30, (5,), generator=g)
    expected = by_definition(objective, ours[:, :30], theirs, nexts)
    slope, = torch.autograd.grad(expected, ours)
    aim = loss.Whole(theirs / objective.temperature)
    found = loss.compare(ours.detach(), aim, True, objective, nexts, 30)
    assert float(found.loss) == pytest.approx(float(expected.detach()), rel=1e-4, abs=1e-4)
    assert found.slope is not None
    torch.testing.assert_close(found.slope, slope, rtol=1e-4, atol=1e-5)
    assert float(found.nll) == pytest.approx(float(cross_entropy(ours[:, :30], nexts, reduction="sum").detach()), rel=1e-4)
    # all of the teacher's tokens kept: the same
    every = loss.compare(ours.detach(), loss.TopK.of(aim, 30), True, objective, nexts, 30)
    assert every.slope is not None
    assert float(every.loss) == pytest.approx(float(found.loss), rel=1e-4, abs=1e-4)
    torch.testing.assert_close(every.slope, found.slope, rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(st.booleans(), st.integers(1, 29), st.integers(0, 10_000))
def test_fewer_tokens_of_the_teacher_are_classes_and_lose_no_less_than_nothing(reverse: bool, k: int, seed: int) -> None:
    """By definition: the k likeliest and all others as one. Merging classes never adds divergence (log-sum inequality)."""
    g = torch.Generator().manual_seed(seed)
    ours, theirs = (torch.randn(4, 30, generator=g) * 2).requires_grad_(), torch.randn(4, 30, generator=g) * 2
    aim = loss.TopK.of(loss.Whole(theirs), k)

    def classes(x: torch.Tensor) -> torch.Tensor:
        p = torch.softmax(x, -1)
        return torch.cat([p.gather(1, aim.ids), p.scatter(1, aim.ids, 0).sum(-1, keepdim=True)], -1).log()
    q, p = classes(ours), classes(theirs)
    expected = kl_div(p, q, reduction="sum", log_target=True) if reverse else kl_div(q, p, reduction="sum", log_target=True)
    found = loss.compare(ours.detach(), aim, True, loss.Objective(reverse))
    assert found.slope is not None
    assert float(found.loss) == pytest.approx(float(expected.detach()), rel=1e-3, abs=1e-4)
    torch.testing.assert_close(found.slope, torch.autograd.grad(expected, ours)[0], rtol=1e-3, atol=1e-4)
    whole = loss.compare(ours.detach(), loss.Whole(theirs), False, loss.Objective(reverse))
    assert float(found.loss) <= float(whole.loss) + 1e-4


@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_reach_the_head_and_skip_what_does_not_count(reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_BYTES", 50 * 4 * 3)  # three positions at a time
    head, theirs = nn.Linear(16, 50, bias=False), torch.randn(14, 50)
    states, objective = torch.randn(2, 7, 16, requires_grad=True), loss.Objective(reverse, 2.0, 0.4)
    targets = torch.randint(50, (14,))
    targets[[2, 6, 13]] = -1
    counted = targets >= 0
    expected = by_definition(objective, head(states).view(14, 50)[counted], theirs[counted], targets[counted]) / 11
    wanted = torch.autograd.grad(expected, [states, head.weight])
    found, nll = loss.distillation_loss(states, lambda part: loss.Whole(theirs[part] / 2), lambda h: head(h)[0], 50,
                                        objective, targets, [head.weight])
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    plain = cross_entropy(head(states).view(14, 50), targets, ignore_index=-1)
    assert float(nll) == pytest.approx(float(plain.detach()), rel=1e-5)
    for mine, other in zip(torch.autograd.grad(found, [states, head.weight]), wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def whole(head: nn.Module, known: torch.Tensor) -> Callable[[slice], loss.Whole]:
    """All that a teacher says at a range of positions."""
    return lambda part: loss.Whole(head(known.reshape(-1, known.shape[-1])[part]).detach())


def test_divergence_in_chunks_is_that_of_whole_logits_and_so_is_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = nn.Linear(16, 50, bias=False), nn.Linear(16, 50, bias=False)
    known = torch.randn(2, 7, 16)
    start = torch.randn(2, 7, 16, requires_grad=True)
    expected = nn.functional.kl_div(torch.log_softmax(ours(start), -1), torch.log_softmax(theirs(known), -1),
                                    reduction="sum", log_target=True) / 14
    gradient, = torch.autograd.grad(expected, start)
    monkeypatch.setattr(loss, "CHUNK_BYTES", 50 * 4 * 3)  # three positions at a time
    monkeypatch.setattr(loss, "CACHE_BYTES", 50 * 4 * 2)  # in twos
    aims = whole(theirs, known)
    found, _ = loss.distillation_loss(start * 1, aims, lambda h: ours(h)[0], 50)
    found.backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(start.grad, gradient)
    nothing, _ = loss.distillation_loss(known, aims, lambda h: theirs(h)[0], 50)
    assert float(nothing) == pytest.approx(0, abs=1e-6)


def test_the_likeliest_tokens_of_the_teacher_are_its_whole_divergence_when_they_are_all() -> None:
    theirs, ours = torch.randn(5, 40) * 3, (torch.randn(5, 40) * 3).requires_grad_()
    whole_loss, _, whole_slope = loss.compare(ours.detach(), loss.Whole(theirs), True)
    every_loss, _, every_slope = loss.compare(ours.detach(), loss.TopK.of(loss.Whole(theirs), 40), True)
    assert float(every_loss) == pytest.approx(float(whole_loss), rel=1e-5)
    torch.testing.assert_close(every_slope, whole_slope)
    # fewer: k + 1 classes, by definition and autograd
    aim = loss.TopK.of(loss.Whole(theirs), 7)
    few_loss, _, few_slope = loss.compare(ours.detach(), aim, True)
    p, q = torch.softmax(theirs, -1), torch.softmax(ours, -1)

    def classes(x: torch.Tensor) -> torch.Tensor:
        top = x.gather(1, aim.ids)
        return torch.cat([top, 1 - top.sum(-1, keepdim=True)], -1)
    expected = (classes(p) * (classes(p).log() - classes(q).log())).sum()
    assert float(few_loss) == pytest.approx(float(expected.detach()), rel=1e-4)
    assert few_loss < whole_loss
    torch.testing.assert_close(few_slope, torch.autograd.grad(expected, ours)[0], rtol=1e-4, atol=1e-5)
