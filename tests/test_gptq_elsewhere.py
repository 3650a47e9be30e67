"""The folders that llmc quantizes, read by transformers with optimum and gptqmodel: the same logits as llmc's own reading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rounding import gptq_folder
from tiny import build, unseen

pytest.importorskip("gptqmodel", reason="gptqmodel is not installed; 7.7 wants torch 2.14, so it has its own environment")
pytest.importorskip("optimum.gptq", reason="transformers reads GPTQ folders by optimum, which is not installed")
from transformers import AutoModelForCausalLM

from llmc.formats.hf import load_torch_model
from llmc.formats.types import IntegerType

HALF = 3e-3  # gptqmodel's kernels for a CPU compute in half precision: 1e-3 is what is seen. A wrong zero point gives 1


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (8, True), (4, False)])
@torch.no_grad()
def test_transformers_reads_our_codes(bits: int, symmetric: bool, tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "m", hidden_size=128, intermediate_size=256)
    gptq_folder(folder, tmp_path / "q", IntegerType(bits, 32, symmetric))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "q", device_map="cpu", dtype=torch.float32)
    assert any(type(m).__module__.startswith("gptqmodel") for m in theirs.modules())
    ids = unseen()[:2]
    expected, found = (m(input_ids=ids).logits.float() for m in (load_torch_model(tmp_path / "q"), theirs))
    assert float((expected - found).norm() / expected.norm()) < HALF
