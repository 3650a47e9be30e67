"""GGUF files that must not pass."""

from __future__ import annotations

import numpy as np
import pytest
from gguf_files import export, stored
from rounding import gptq_folder
from tiny import build, edit_tensors

from llmc.errors import UserError
from llmc.export.gguf import GgufExportConfig, verify
from llmc.export.gguf import export as pipeline
from llmc.export.gguf.plan import Types
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.hf import load_tokenizer
from llmc.formats.types import IntegerType


@pytest.mark.parametrize("name", ["blk.0.attn_q.weight", "blk.1.ffn_down.weight", "token_embd.weight",
                                  "blk.1.attn_norm.weight"])
def test_a_flipped_bit_is_found(name, tmp_path):
    gptq_folder(build("llama", tmp_path / "m"), tmp_path / "q", IntegerType(4, 32))
    export(tmp_path / "q")
    config = GgufExportConfig(model=tmp_path / "q")
    ckpt = Checkpoint.open(tmp_path / "q")
    entries = pipeline.plan_file(config, ckpt, load_tokenizer(ckpt.folder), Types.choose(config, ckpt)).entries
    file = tmp_path / "q.gguf"
    counts = verify.tensors(file, entries)
    assert counts["tensors"] == len(entries)
    t = stored(file)[name]
    data = bytearray(file.read_bytes())
    for offset, bit in ((t.data_offset, 0), (t.data_offset + t.n_bytes - 1, 7), (t.data_offset + t.n_bytes // 2, 3)):
        data[offset] ^= 1 << bit
        file.write_bytes(data)
        with pytest.raises(UserError, match=name):
            verify.tensors(file, entries)
        data[offset] ^= 1 << bit


def test_a_file_that_computes_otherwise_is_not_kept(tmp_path, monkeypatch):
    folder = build("llama", tmp_path / "m")
    monkeypatch.setattr("llmc.export.gguf.plan.interleave", lambda rows, heads: np.arange(rows))
    with pytest.raises(UserError, match="logits are not torch's"):
        export(folder, float_type="f32")
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == []


def test_a_broken_checkpoint_leaves_nothing_behind(tmp_path):
    folder = build("llama", tmp_path / "m")
    with edit_tensors(folder) as tensors:
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    with pytest.raises(UserError, match="NaN or infinity"):
        export(folder)
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == []


def test_a_foreign_file_is_not_overwritten(tmp_path):
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(UserError, match="was not made by llmc"):
        export(build("llama", tmp_path / "m"))
    assert (tmp_path / "m.gguf").read_text() == "mine"
