"""The folders that llmc quantizes, read by transformers with optimum and gptqmodel: the same logits as llmc's own reading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rounding import gptq_folder
from tiny import build, unseen

WHY = "pip install gptqmodel optimum, in an environment of their own: gptqmodel 7.7 wants torch 2.14"
pytest.importorskip("gptqmodel", reason=WHY)
pytest.importorskip("optimum.gptq", reason=WHY)

from transformers import AutoModelForCausalLM

from llmc.formats.hf import load_torch_model
from llmc.formats.types import IntegerType


@pytest.mark.parametrize(("bits", "symmetric", "bound"), [
    (4, True, 3e-3),  # torch's own kernel for 4 bits on a CPU, which gptqmodel takes, has scales in bfloat16
    (8, True, 1e-5), (4, False, 3e-3)])
@torch.no_grad()
def test_transformers_reads_our_codes(bits: int, symmetric: bool, bound: float, tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "m", hidden_size=128, intermediate_size=256)
    gptq_folder(folder, tmp_path / "q", IntegerType(bits, 32, symmetric))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "q", device_map="cpu", dtype=torch.float32)
    assert any(type(m).__module__.startswith("gptqmodel") for m in theirs.modules())
    ids = unseen()[:2]
    expected, found = (m(input_ids=ids).logits.float() for m in (load_torch_model(tmp_path / "q"), theirs))
    assert float((expected - found).norm() / expected.norm()) < bound
