"""Whole models that teach or learn: their heads, their checkpointed layers, the rate of learning."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from tiny import build

from llmc.compress.heal import student
from llmc.compress.teaching import models
from llmc.compress.teaching.training import schedule
from llmc.formats.hf import load_torch_model


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_the_head_is_the_models_own(family: str, tmp_path: Path) -> None:
    """Gemma 2 caps its logits; whatever an architecture does there must be done."""
    model = load_torch_model(build(family, tmp_path / "m"))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        whole = model(ids).logits[0]
        states = models.hidden_states(model, ids)
        with models.head_of(model) as head:
            torch.testing.assert_close(head(states[:, 5:9]), whole[5:9])
        torch.testing.assert_close(model(ids).logits[0], whole)


def test_schedule_warms_up_and_falls() -> None:
    rates = [schedule(i, 100) for i in range(100)]
    assert rates[0] < rates[3] < rates[4] == 1
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))
    assert rates[-1] < 0.06


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_checkpointing_runs_layers_again_and_has_the_same_gradients(family: str, tmp_path: Path) -> None:
    ids = torch.arange(20)[None]
    gradients, calls = [], []
    for checkpointing in (False, True):
        model = load_torch_model(build(family, tmp_path / "m"))
        if checkpointing:
            models.checkpoint_layers(model)
        norm = next(iter(student.norm_weights(model).values()))
        linear = next(m for m in model.modules() if student.is_linear(m))
        linear.register_forward_hook(lambda *_args, c=checkpointing: calls.append(c))
        models.hidden_states(model, ids).square().sum().backward()
        gradients.append(norm.grad)
    assert (calls.count(False), calls.count(True)) == (1, 2)
    torch.testing.assert_close(*gradients)
