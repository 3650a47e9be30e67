"""Healing by blocks: each layer learns its teacher's outputs."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from killing import interrupted, resumed
from tiny import build, corpus, tokenizer, write_text
from training import HEAL

import llmc
from llmc.compress.heal import blocks
from llmc.errors import UserError
from llmc.formats import quantized as quantized_folder
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.hf import load_torch_model
from llmc.formats.manifest import hash_folder


@torch.no_grad()
def output_error(folder: Path, base: Path) -> float:
    """Mean relative squared error of the states behind the last layer, on text that healing has not seen."""
    ids = tokenizer()(corpus()[100_000:110_000], return_tensors="pt").input_ids[:, : 8 * 64].view(8, 64)
    ours, theirs = (load_torch_model(f)(ids, output_hidden_states=True).hidden_states[-1] for f in (folder, base))
    return float(((ours - theirs).square().mean(-1) / theirs.square().mean(-1)).mean())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_blocks_learn_their_teachers_outputs(family: str, tmp_path: Path) -> None:
    base = build(family, tmp_path / "base")
    llmc.quantize(base, method="rtn", out=tmp_path / "small", threads=2)
    text = write_text(tmp_path / "text.txt")
    options = {**HEAL, "lr": 0.005}
    result = llmc.heal(tmp_path / "small", base, calibration=text, scope="block", out=tmp_path / "healed", **options)
    assert result["error"]["after"] < 0.95 * result["error"]["before"]
    assert output_error(tmp_path / "healed", base) < 0.95 * output_error(tmp_path / "small", base)
    before, after = (Checkpoint.open(tmp_path / f) for f in ("small", "healed"))
    for name in quantized_folder.linears(before):
        ours, theirs = quantized_folder.read(after, name), quantized_folder.read(before, name)
        assert torch.equal(ours.codes, theirs.codes)
    layers = json.loads((tmp_path / "healed/llmc.json").read_text())["passes"][-1]["layers"]
    assert [x["layer"] for x in layers] == [0, 1]
    assert llmc.verify(tmp_path / "healed")["problems"] == []
    llmc.heal(tmp_path / "small", base, calibration=text, scope="block", out=tmp_path / "again", **options)
    assert hash_folder(tmp_path / "again") == hash_folder(tmp_path / "healed")


def test_blocks_go_on_after_a_kill(rounded: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, small, text = rounded
    options = {**HEAL, "calibration": text, "scope": "block"}
    resumed(partial(llmc.heal, small, base, **options), tmp_path, interrupted(blocks.Blocks, "_heal", layer=1))


def test_a_model_in_other_axes_is_no_students_teacher_by_blocks(rounded: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, small, text = rounded
    other = build("llama", tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="its states are not the teacher's"):
        llmc.heal(small, other, calibration=text, scope="block", out=tmp_path / "x", **HEAL)
