"""Rotations: orthogonal, and the logits stay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import FAMILIES, build
from transforming import logits, same

import llmc
from llmc.compress.transform import rotations
from llmc.errors import UserError
from llmc.formats.checkpoint import Checkpoint

ROTATABLE = ("llama", "mistral", "qwen2", "qwen3", "phi3")


@pytest.mark.parametrize("n", [1, 2, 9, 12, 16, 36, 45])
def test_orthogonal(n: int) -> None:
    r = rotations.orthogonal(n, torch.Generator().manual_seed(n))
    torch.testing.assert_close(r @ r.t(), torch.eye(n, dtype=torch.float64))
    if n == 16:
        torch.testing.assert_close(r.abs(), torch.full_like(r, 0.25))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head_dim", [None, 12])
def test_r2_keeps_the_logits(family: str, head_dim: int | None, tmp_path: Path) -> None:
    """Heads of 12 too, where no Hadamard matrix of that order is taken."""
    options = {} if head_dim is None else {"head_dim": 12} if family in ("llama", "qwen3", "gemma2") else {
        "hidden_size": 48, "n_embd": 48, "rotary_pct": 0.5, "word_embed_proj_dim": 48}
    folder = build(family, tmp_path / "m", **options)
    llmc.transform(folder, scaling="none", rotate="r2", out=tmp_path / "r", threads=1)
    same(logits(tmp_path / "r"), logits(folder), 1e-5)


@pytest.mark.parametrize("family", ROTATABLE)
def test_r1_keeps_the_logits(family: str, tmp_path: Path) -> None:
    folder = build(family, tmp_path / "m", tie_word_embeddings=False)
    result = llmc.transform(folder, scaling="none", rotate="r1r2", out=tmp_path / "r", threads=1)
    same(logits(tmp_path / "r"), logits(folder), 1e-5)
    assert result["untied_bytes"] == 0
    before, after = Checkpoint.open(folder), Checkpoint.open(tmp_path / "r")
    assert sorted(before.names()) == sorted(after.names())
    assert all(before.shape(n) == after.shape(n) for n in before.names())
    assert bool((after.tensor("model.layers.0.input_layernorm.weight") == 1).all())
    embedding = "model.embed_tokens.weight"
    assert not torch.allclose(before.tensor(embedding), after.tensor(embedding), atol=0.1)
    assert before.config == after.config


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(ROTATABLE)))
def test_streams_that_cannot_be_rotated_are_refused_with_the_reason(family: str, tmp_path: Path) -> None:
    folder = build(family, tmp_path / "m", tie_word_embeddings=False)
    with pytest.raises(UserError, match="norms after attention" if "gemma" in family else "subtracts the mean"):
        llmc.transform(folder, scaling="none", rotate="r1r2", out=tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_r1_unties_only_when_told_to(tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "m")
    with pytest.raises(UserError, match=r"takes 34\.8 kB in an 8-bit file") as e:
        llmc.transform(folder, rotate="r1r2", scaling="none", out=tmp_path / "r")
    assert "--untie" in e.value.hint
    result = llmc.transform(folder, rotate="r1r2", scaling="none", untie=True, out=tmp_path / "r", threads=1)
    assert result["untied_bytes"] == 512 * 64 * 34 // 32
    same(logits(tmp_path / "r"), logits(folder), 1e-5)
    config = json.loads((tmp_path / "r/config.json").read_text())
    assert config == {**json.loads((folder / "config.json").read_text()), "tie_word_embeddings": False}
