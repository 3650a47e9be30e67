"""Masks on whole folders: every method on every family, exact zeros, and what cannot be factored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pruning import prune, zeros
from tiny import FAMILIES, build

import llmc
from llmc.errors import UserError
from llmc.formats.checkpoint import Checkpoint


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_on_every_family(family: str, tmp_path: Path, text: Path) -> None:
    """The zeros are exact and as many as asked for in every linear, nothing else changes, and what was measured is true."""
    base = build(family, tmp_path / "base", dtype=torch.bfloat16)
    done = prune(base, text, tmp_path / "out", method="sparsegpt", pattern="2:4")
    found = zeros(tmp_path / "out")
    assert all(int(z.view(len(z), -1, 4).sum(-1).min()) == 2 for z in found.values())
    assert done["fallbacks"] == 0
    assert done["sparsity"] == pytest.approx(0.5, abs=1e-3)
    before, after = Checkpoint.open(base), Checkpoint.open(tmp_path / "out")
    assert sorted(before.names()) == sorted(after.names())
    for name in set(before.names()) - {f"{n}.weight" for n in found}:
        assert torch.equal(before.tensor(name), after.tensor(name)), name
    assert {after.dtype(n) for n in after.names()} == {"BF16"}
    assert (tmp_path / "out/config.json").read_text() == json.dumps(before.config, indent=2, ensure_ascii=False) + "\n"
    (entry,) = json.loads((tmp_path / "out/llmc.json").read_text())["passes"]
    assert entry["name"] == "prune"
    assert entry["quality"]["kld"]["value"] == done["quality"]["kld"]["value"] > 0
    assert len(entry["layers"][0]["linears"]) == len(found) // len(entry["layers"])
    assert llmc.verify(tmp_path / "out")["problems"] == []


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_shares_of_every_method(method: str, tmp_path: Path, text: Path) -> None:
    base = build("llama", tmp_path / "base")
    done = prune(base, text, tmp_path / "out", method=method, sparsity=0.25)
    for z in zeros(tmp_path / "out").values():
        assert int(z.sum()) == z.numel() // 4
        if method == "wanda":
            assert bool((z.sum(1) == z.shape[1] // 4).all())
    assert done["nonzero"] == done["parameters"] - sum(int(z.sum()) for z in zeros(tmp_path / "out").values())
    if method != "sparsegpt":  # the weights that stay are those of the source
        before, after = Checkpoint.open(base), Checkpoint.open(tmp_path / "out")
        for name in before.names():
            kept = after.tensor(name) != 0
            assert torch.equal(before.tensor(name)[kept], after.tensor(name)[kept])


def test_rows_that_a_pattern_does_not_divide(tmp_path: Path, text: Path) -> None:
    base = build("llama", tmp_path / "base", intermediate_size=126)
    with pytest.raises(UserError, match=r"rows of 126 weights .*down_proj.* do not divide into runs of 4"):
        prune(base, text, tmp_path / "out", pattern="2:4")


def test_a_layer_that_cannot_be_factored_is_pruned_by_wanda_counted_and_named(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    from llmc.compress.quantize import gptq

    base = build("llama", tmp_path / "base")
    factor = gptq.inverse_factor
    monkeypatch.setattr(gptq, "inverse_factor", lambda h, order: None if h.shape[0] == 128 else factor(h, order))
    done = prune(base, text, tmp_path / "out")
    assert done["fallbacks"] == 2
    layer = json.loads((tmp_path / "out/llmc.json").read_text())["passes"][0]["layers"][0]
    assert layer["linears"]["mlp.down_proj"]["method"] == "wanda"
    assert layer["linears"]["mlp.up_proj"]["method"] == "sparsegpt"
    assert "mlp.down_proj: pruned by Wanda" in capsys.readouterr().err
