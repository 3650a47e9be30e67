"""The student of a distillation: its gradients, hidden states, and adapters."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import build
from training import DISTILL

import llmc
from llmc.compress.distill import adapters, student
from llmc.compress.teaching import loss
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.hf import load_torch_model


def test_a_student_that_is_the_teacher_has_no_gradient(trio: tuple[Path, Path, Path]) -> None:
    model = load_torch_model(trio[0])
    ids = torch.arange(40).view(2, 20)
    targets = ids.flatten().roll(-1)
    for objective in (loss.Objective(), loss.Objective(reverse=True, temperature=3.0)):
        mine = student.Student(model, objective, 512, [0, 2], 1.0, (64, 64))
        with torch.no_grad(), student.captured(model, [0, 2]) as theirs:
            logits = model(ids).logits.view(40, 512)
        states = [s.clone() for s in theirs]
        said = logits / objective.temperature
        whole, _, _, hidden = mine(ids, targets, lambda part, said=said: loss.Whole(said[part]), states)
        whole.backward()
        assert float(hidden) == pytest.approx(0, abs=1e-12)
        assert max(float(p.grad.abs().max()) for p in model.parameters()) < 1e-4
        model.zero_grad()


def test_hidden_states_help_and_their_matrices_are_gone_in_the_end(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    teacher, student, text = trio
    result = llmc.distill(student, teacher, calibration=text, out=tmp_path / "out", hidden_weight=1.0, **DISTILL)
    assert result["layer_map"] == [[0, 1], [1, 2]]
    errors = [row["hidden"] for row in result["curve"][1:]]
    assert errors[-1] < errors[0]
    assert set(Checkpoint.open(tmp_path / "out").names()) == set(Checkpoint.open(student).names())
    given = llmc.distill(student, teacher, calibration=text, out=tmp_path / "given", hidden_weight=1.0, layer_map="1:2",
                         **DISTILL | {"steps": 2})
    assert given["layer_map"] == [[1, 2]]


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 60))
def test_layers_are_spread_evenly_and_the_last_meets_the_last(ours: int, theirs: int) -> None:
    pairs = student.map_layers(None, ours, theirs)
    aims = [b for _, b in pairs]
    assert [a for a, _ in pairs] == list(range(ours))
    assert aims == sorted(aims)
    assert aims[-1] == theirs - 1
    assert aims[0] >= 0
    if ours <= theirs:
        steps = {b - a for a, b in itertools.pairwise(aims)}
        assert len(set(aims)) == ours
        assert max(steps, default=1) - min(steps, default=1) <= 1


def test_a_narrower_student_learns_through_a_projection(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    teacher, _, text = trio
    narrow = build("llama", tmp_path / "narrow", hidden_size=32, seed=3)
    result = llmc.distill(narrow, teacher, calibration=text, out=tmp_path / "out", hidden_weight=0.5, **DISTILL)
    assert result["loss"]["after"] < result["loss"]["before"]
    q = student.projection(32, 64, 0).weight
    torch.testing.assert_close(q.t() @ q, torch.eye(32), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merged_adapters_say_what_they_said(family: str, tmp_path: Path) -> None:
    model = load_torch_model(build(family, tmp_path / "m"))
    names, ids = [n for n, _ in model.named_parameters()], torch.arange(20)[None]
    with torch.no_grad():
        start = model(ids).logits
        adapters.add_adapters(model, 4, seed=0)
        trained = [p for p in model.parameters() if p.requires_grad]
        assert 0 < sum(p.numel() for p in trained) < 0.2 * sum(p.numel() for p in model.parameters())
        torch.testing.assert_close(model(ids).logits, start)
        for p in trained:
            p.normal_(0, 0.05)
        adapted = model(ids).logits
        adapters.merge_adapters(model)
        torch.testing.assert_close(model(ids).logits, adapted, rtol=1e-4, atol=1e-4)
    assert float((adapted - start).abs().max()) > 0.1
    assert [n for n, _ in model.named_parameters()] == names


def test_adapters_learn_and_leave_the_rest_alone(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    teacher, student, text = trio
    result = llmc.distill(student, teacher, calibration=text, out=tmp_path / "out", lora=4, **DISTILL)
    assert result["loss"]["after"] < result["loss"]["before"]
    before, after = Checkpoint.open(student), Checkpoint.open(tmp_path / "out")
    changed = {n for n in before.names() if not torch.equal(before.tensor(n), after.tensor(n))}
    assert changed == {n for n in before.names() if "proj" in n}
