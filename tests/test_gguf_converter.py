"""llama.cpp's converter lays the file out, llmc puts its codes in: rows are found by value wherever they went."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from gguf import GGUFReader
from gguf.quants import dequantize
from gguf_files import checkout
from rounding import gptq_folder
from tiny import build

from llmc.errors import UserError
from llmc.export.gguf import GgufExportConfig, export_gguf
from llmc.export.gguf.converter import Row, RowIndex, _is_matrix
from llmc.families import FAMILIES
from llmc.formats.gguf import field
from llmc.formats.types import IntegerType


def export(folder: Path, converter: Path, **options: Any) -> dict[str, Any]:
    return export_gguf(GgufExportConfig(model=folder, out=folder.with_suffix(".gguf"), converter=converter, threads=1,
                                        **options))


def test_codes_are_found_through_permuting_and_fusing(tmp_path):
    source = gptq_folder(build("llama", tmp_path / "m"), tmp_path / "q", IntegerType(4, 32))
    report = export(tmp_path / "q", checkout(tmp_path / "llama.cpp"))
    assert report["verified"]["code_weights"] == sum(q.codes.numel() for q in source.values())
    assert report["tensor_types"] == {"Q4_0": 10, "Q8_0": 1, "F32": 5}
    assert "14 quantized linears were found by value in 10 of its 16 tensors" in report["notes"][0]
    fused = next(t for t in GGUFReader(report["path"]).tensors if t.name == "blk.1.attn_qkv.weight")
    q, k, v = (source[f"model.layers.1.self_attn.{x}_proj"].dequantize().numpy() for x in "qkv")
    order = [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15]  # heads of 16 rows: 4 of Q, 2 of K
    expected = [x[h * 16 + i] for x, heads in ((q, 4), (k, 2)) for h in range(heads) for i in order] + list(v)
    assert np.array_equal(dequantize(fused.data, fused.tensor_type), np.stack(expected))


def test_a_float_model_goes_through_too(tmp_path):
    report = export(build("llama", tmp_path / "m"), checkout(tmp_path / "llama.cpp"), float_type="q8_0")
    assert report["tensor_types"] == {"Q8_0": 11, "F32": 5}
    assert not list(tmp_path.glob(".llmc-convert-*"))


@pytest.mark.parametrize(("name", "shape", "matrix"), [
    ("blk.0.attn_q.weight", (64, 64), True), ("blk.3.ffn_up_exps.weight", (4, 64, 64), True),
    ("blk.0.ssm_in.weight", (64, 64), True),
    ("blk.0.ffn_down_shexp.weight", (64, 64), True), ("blk.0.attn_kv_b.weight", (64, 64), True),
    ("per_layer_token_embd.weight", (64, 64), True), ("blk.0.time_mix_key.weight", (64, 64), True),
    ("blk.0.ffn_gate_inp.weight", (4, 64), False), ("blk.0.ssm_conv1d.weight", (64, 4), False),
    ("blk.0.ssm_a", (64, 16), False),
    ("blk.0.attn_q_norm.weight", (4, 64), False), ("blk.0.attn_norm.weight", (64,), False),
    ("position_embd.weight", (64, 64), False), ("blk.0.time_mix_w1.weight", (64, 8), False)])
def test_float_type_is_that_of_every_matrix_whatever_its_name(name: str, shape: tuple[int, ...], matrix: bool) -> None:
    assert _is_matrix(name, shape) is matrix


def test_a_window_that_llama_cpp_ignores_is_noted(tmp_path):
    folder = build("llama", tmp_path / "m")
    tiny.edit_config(folder, sliding_window=128)
    assert any("sliding window of 128 tokens" in n for n in export(folder, checkout(tmp_path / "llama.cpp"))["notes"])


def test_metadata_is_the_converters_and_what_llmc_knows_better(tmp_path):
    folder = build("llama", tmp_path / "m", style="gpt2")
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 9]}')
    gptq_folder(folder, tmp_path / "q", IntegerType(4, 32))
    report = export(tmp_path / "q", checkout(tmp_path / "llama.cpp"))
    reader = GGUFReader(report["path"])
    assert field(reader, "llama.attention.head_count_kv") == 2
    assert field(reader, "general.quantized_by") == "llmc"
    assert field(reader, "tokenizer.ggml.add_bos_token") is False
    assert {1, 9} <= set(report["token_ids"]["end_tokens"])


def test_values_that_the_converter_changed_are_an_error(tmp_path):
    gptq_folder(build("llama", tmp_path / "m"), tmp_path / "q", IntegerType(4, 32))
    scaled = checkout(tmp_path / "scaled", 'weights["model.layers.1.mlp.down_proj.weight"] *= 2')
    with pytest.raises(UserError, match=r"64 rows of 1 quantized linears \(first model\.layers\.1\.mlp\.down_proj\)"):
        export(tmp_path / "q", scaled)
    partly = checkout(tmp_path / "partly", 'weights["model.layers.1.self_attn.v_proj.weight"] *= 2')
    with pytest.raises(UserError, match=r"32 of the 128 rows of blk\.1\.attn_qkv\.weight are in no quantized"):
        export(tmp_path / "q", partly)
    assert not (tmp_path / "q.gguf").exists()


def test_a_converter_that_fails_is_quoted(tmp_path):
    broken = checkout(tmp_path / "llama.cpp", 'raise NotImplementedError("no such model")')
    with pytest.raises(UserError, match=r"converter failed on m \(code 1\): NotImplementedError: no such model"):
        export(build("llama", tmp_path / "m"), broken)
    with pytest.raises(UserError, match=r"has no convert_hf_to_gguf\.py"):
        export(tmp_path / "m", tmp_path)


# ------------------------------------------------------------------------------------------------------- rows by value


def index_of(*linears: np.ndarray) -> RowIndex:
    index = RowIndex()
    for i, values in enumerate(linears):
        index.add(i, values, "q4_k")
    return index


def test_rows_are_found_through_permuting_fusing_and_stacking():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((6, 32)).astype(np.float32), rng.standard_normal((4, 32)).astype(np.float32)
    order = rng.permutation(10)
    index = index_of(a, b)
    found = index.find("fused", np.concatenate([a, b])[order])
    assert found == [Row(0, i) if i < 6 else Row(1, i - 6) for i in order]
    assert not index.left
    assert index_of(a, b).find("other", rng.standard_normal((6, 32)).astype(np.float32)) is None
    assert index_of(a, b).find("narrow", a[:, :16].copy()) is None


def test_a_matrix_of_which_only_some_rows_are_known_is_an_error():
    a = np.random.default_rng(0).standard_normal((6, 32)).astype(np.float32)
    mixed = np.concatenate([a, a[:2] * 2])
    with pytest.raises(UserError, match="2 of the 8 rows of mixed"):
        index_of(a).find("mixed", mixed)


def test_equal_rows_are_each_used_once_and_zero_rows_prove_nothing():
    a = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)
    a[1] = a[0]
    a[3] = 0
    index = index_of(a, a.copy())
    assert index.find("padding", np.zeros((5, 32), np.float32)) is None  # an embedding's unused rows, say
    found = index.find("both", np.concatenate([a[::-1], -0.0 * a[3:], a[:3]]))
    assert len(set(found)) == 8
    assert not index.left


# --------------------------------------------------------------------------------------------------- the real converter


LLAMA_CPP = os.environ.get("LLMC_LLAMA_CPP")
OTHERS = {"bloom": {"n_layer": 2, "n_head": 4}, "starcoder2": {"sliding_window": None},
          "mixtral": {"num_local_experts": 4, "sliding_window": None}}


@pytest.mark.skipif(not LLAMA_CPP, reason="LLMC_LLAMA_CPP does not name a llama.cpp checkout")
@pytest.mark.parametrize("family", OTHERS)
def test_llama_cpps_own_converter(family, tmp_path, monkeypatch):
    """Bloom's converter takes Q, K and V apart and Mixtral's stacks experts; llmc knows only the latter by itself."""
    assert LLAMA_CPP is not None
    monkeypatch.setitem(tiny.FAMILIES, family, OTHERS[family])
    folder = build(family, tmp_path / "m", hidden_size=128)
    source = gptq_folder(folder, tmp_path / "q", IntegerType(4, 32), lambda n: (
        (".layers." in n or ".h." in n or n.startswith("h.")) and n.endswith(".weight")
        and not any(x in n for x in ("norm", "gate.weight"))))
    if family not in FAMILIES:
        with pytest.raises(UserError, match="does not write the architecture"):
            export_gguf(GgufExportConfig(model=tmp_path / "q"))
    report = export(tmp_path / "q", Path(LLAMA_CPP))
    assert report["verified"]["code_weights"] == sum(q.codes.numel() for q in source.values())
    assert report["logits"]["mean_kld"] < 0.05
