"""llama.cpp's converter lays the file out, llmc puts its codes in: rows are found by value wherever they went."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import architectures
import mixtures
import numpy as np
import pytest
import tiny
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from gguf_files import checkout, needs_converter
from rounding import gptq_folder
from tiny import build, edit_tensors
from transformers import AutoConfig, AutoModelForImageTextToText

import llmc
from llmc.errors import UserError
from llmc.export.gguf import GgufExportConfig, export_gguf, run_converter
from llmc.export.gguf.matching import Index, digests, evidence
from llmc.formats.gguf import field
from llmc.formats.types import IntegerType
from llmc.sources.llama_cpp import find_converter


def export(folder: Path, converter: Path | None = None, **options: Any) -> dict[str, Any]:
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


def test_what_llama_cpp_needs_in_float32_stays_so_and_narrow_rows_are_f16(tmp_path):
    exact = checkout(tmp_path / "exact", 'FLOAT = ["blk.0.ffn_up.weight"]')
    report = export(build("llama", tmp_path / "m", intermediate_size=80), exact, float_type="q8_0")
    assert report["tensor_types"] == {"Q8_0": 8, "F16": 2, "F32": 6}  # rows of 80: ffn_down
    gptq_folder(build("llama", tmp_path / "n"), tmp_path / "q", IntegerType(4, 32))
    assert export(tmp_path / "q", exact)["tensor_types"] == {"Q4_0": 9, "Q8_0": 1, "F32": 6}


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


CHANGED = {"model.layers.1.mlp.down_proj.weight": """
weights["model.layers.1.mlp.down_proj.weight"] *= 2
weights["model.layers.1.mlp.up_proj.weight"] /= 2
""", "model.layers.1.self_attn.v_proj.weight": """
weights["model.layers.1.self_attn.v_proj.weight"] *= 2
weights["model.layers.1.self_attn.o_proj.weight"] /= 2
"""}


@pytest.mark.parametrize("name", CHANGED)
def test_values_that_the_converter_changed_have_8_bits(name, tmp_path):
    """The model is the same, so the file passes; what a changed linear shares a tensor with has 8 bits too."""
    gptq_folder(build("llama", tmp_path / "m"), tmp_path / "q", IntegerType(4, 32))
    report = export(tmp_path / "q", checkout(tmp_path / "changed", CHANGED[name]))
    assert report["tensor_types"] == {"Q4_0": 8, "Q8_0": 3, "F32": 5}
    assert any("2 quantized linears (first model.layers.1.mlp.down_proj) have 8 bits" in n
               if "mlp" in name else " quantized linears (first model.layers.1.self_attn" in n for n in report["notes"])


def test_columns_that_the_converter_moved_by_whole_blocks(tmp_path):
    """Blocks of 32 columns of down_proj change places, and the rows of gate_proj and up_proj with them."""
    source = gptq_folder(build("llama", tmp_path / "m"), tmp_path / "q", IntegerType(4, 32))
    moved = checkout(tmp_path / "moved", """
order = np.arange(128).reshape(4, 32)[[2, 0, 3, 1]].reshape(-1)
p = "model.layers.1.mlp."
weights[p + "down_proj.weight"] = weights[p + "down_proj.weight"][:, order]
for x in ("gate", "up"):
    weights[p + x + "_proj.weight"] = weights[p + x + "_proj.weight"][order]
""")
    report = export(tmp_path / "q", moved)
    assert report["verified"]["code_weights"] == sum(q.codes.numel() for q in source.values())
    assert report["tensor_types"] == {"Q4_0": 10, "Q8_0": 1, "F32": 5}
    found = next(t for t in GGUFReader(report["path"]).tensors if t.name == "blk.1.ffn_down.weight")
    order = np.arange(128).reshape(4, 32)[[2, 0, 3, 1]].reshape(-1)
    assert np.array_equal(dequantize(found.data, found.tensor_type),
                          source["model.layers.1.mlp.down_proj"].dequantize().numpy()[:, order])


def test_a_linear_that_the_converter_left_out(tmp_path):
    gptq_folder(build("llama", tmp_path / "m"), tmp_path / "q", IntegerType(4, 32))
    without = checkout(tmp_path / "out", """
weights["model.layers.1.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"]
""")
    with pytest.raises(UserError, match=r"1 quantized linears \(first model\.layers\.1\.mlp\.up_proj\) are not in the file"):
        export(tmp_path / "q", without)
    assert not (tmp_path / "q.gguf").exists()


def test_a_converter_that_fails_is_quoted(tmp_path):
    broken = checkout(tmp_path / "llama.cpp", 'raise NotImplementedError("no such model")')
    with pytest.raises(UserError, match=r"converter failed on m \(code 1\): NotImplementedError: no such model"):
        export(build("llama", tmp_path / "m"), broken)
    with pytest.raises(UserError, match=r"has no convert_hf_to_gguf\.py"):
        export(tmp_path / "m", tmp_path)


def test_a_file_at_which_llama_cpp_aborts_is_one_error(tmp_path):
    """Groups of experts in a model without experts fail an assertion when the file is opened."""
    odd = checkout(tmp_path / "odd", "w.add_expert_group_count(2)")
    with pytest.raises(UserError, match=r"died of m\.gguf: signal 6 \(SIGABRT\)"):
        export(build("llama", tmp_path / "m"), odd)
    assert not list(tmp_path.glob("*.gguf"))


def test_the_converter_is_found_or_offered(tmp_path, monkeypatch):
    folder = build("bloom", tmp_path / "m", n_layer=2, n_head=4)
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="does not write the architecture BloomForCausalLM") as e:
        export(folder)
    assert "`llmc setup converter`" in e.value.hint


# ------------------------------------------------------------------------------------------------------- pieces by value


def index_of(*matrices: np.ndarray) -> Index:
    index = Index()
    for i, values in enumerate(matrices):
        index.add(i, digests(values))
    return index


def test_rows_are_found_through_permuting_fusing_and_stacking():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((6, 32)).astype(np.float32), rng.standard_normal((4, 32)).astype(np.float32)
    order = rng.permutation(10)
    index = index_of(a, b)
    assert set(index.left()) == {0, 1}
    found = index.find(digests(np.concatenate([a, b])[order]))
    assert found.tolist() == [[0, i] if i < 6 else [1, i - 6] for i in order]
    index.place(found)
    assert not index.left()
    other = rng.standard_normal((6, 32)).astype(np.float32)
    assert evidence(other, index.find(digests(other))[:, 0] >= 0) == "none"


def test_a_matrix_of_which_only_some_rows_are_known():
    a = np.random.default_rng(0).standard_normal((6, 32)).astype(np.float32)
    mixed = np.concatenate([a, a[:2] * 2])
    found = index_of(a).find(digests(mixed))
    assert found[6:].tolist() == [[-1, -1]] * 2
    assert evidence(mixed, found[:, 0] >= 0) == "some"


def test_equal_rows_are_each_used_once_and_zero_rows_prove_nothing():
    a = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)
    a[1] = a[0]
    a[3] = 0
    index = index_of(a, a.copy())
    padding = np.zeros((5, 32), np.float32)  # an embedding's unused rows, say
    assert evidence(padding, index.find(digests(padding))[:, 0] >= 0) == "none"
    found = index.find(digests(np.concatenate([a[::-1], -0.0 * a[3:], a[:3]])))
    assert len({tuple(f) for f in found.tolist()}) == 8
    index.place(found)
    assert not index.left()
    assert index.find(digests(a))[:, 0].min() >= 0, "a row may be in two tensors"


# --------------------------------------------------------------------------------------------------- the real converter


MIXTURE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
MLA: dict[str, Any] = {"kv_lora_rank": 64, "q_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
                       "v_head_dim": 32, "num_key_value_heads": 4}
DELTA: dict[str, Any] = {
    "head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32,
    "linear_value_head_dim": 32, "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"]}
# {family: (config, {type: tensors} of the 4-bit file)}
OTHERS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "bloom": ({"n_layer": 2, "n_head": 4}, {"Q4_0": 8, "Q8_0": 1, "F32": 20}),  # Q, K and V taken apart
    "gpt_neox": ({"rotary_pct": 0.25}, {"Q4_0": 8, "IQ4_NL": 1, "Q8_0": 1, "F32": 18}),  # a key that transformers 5 renames
    "mixtral": ({"num_local_experts": 4, "sliding_window": None}, {"Q4_0": 14, "IQ4_NL": 1, "Q8_0": 1, "F32": 7}),
    "qwen3_moe": ({"head_dim": 32, **MIXTURE}, {"Q4_0": 14, "IQ4_NL": 1, "Q8_0": 1, "F32": 11}),
    "youtu": (MLA, {"Q4_0": 14, "Q8_0": 3, "F16": 2, "F32": 9}),  # kv_b_proj split, one half transposed
}


def is_linear(name: str) -> bool:
    return any(x in name for x in (".layers.", ".h.")) and name.endswith(".weight") and not any(
        x in name for x in ("norm", "gate.weight", "kv_a_proj", "conv1d"))


@needs_converter
@pytest.mark.parametrize("family", OTHERS)
def test_llama_cpps_own_converter(family, tmp_path, monkeypatch):
    config, types = OTHERS[family]
    monkeypatch.setitem(tiny.FAMILIES, family, config)
    folder = build(family, tmp_path / "m", hidden_size=128)
    source = gptq_folder(folder, tmp_path / "q", IntegerType(4, 32), is_linear)
    report = export(tmp_path / "q")
    assert report["tensor_types"] == types
    missing = sum(q.codes.numel() for q in source.values()) - report["verified"]["code_weights"]
    assert missing == (4 * 32 * 64 * 2 if family == "youtu" else 0)
    assert any("2 quantized linears" in n and "have 8 bits" in n for n in report["notes"]) == (family == "youtu")


@needs_converter
def test_the_vision_part_is_a_second_file(tmp_path):
    """Gemma 3 with vision, under the hub's names: the text model is proved, and the rest is written beside it."""
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
              "image_size": 56, "patch_size": 14}
    text = {**tiny.COMMON, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64, "num_hidden_layers": 6}
    c = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4, boi_token_index=2,
                             eoi_token_index=3, image_token_index=4)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(c).save_pretrained(tmp_path / "m")
    tiny.tokenizer().save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}')
    with edit_tensors(tmp_path / "m") as tensors:
        for name in [n for n in tensors if "vision_tower." in n and "vision_model." not in n]:
            tensors[name.replace("vision_tower.", "vision_tower.vision_model.")] = tensors.pop(name)
    report = export(tmp_path / "m", mmproj="f16")
    beside = Path(report["mmproj"]["path"])
    assert beside == tmp_path / "mmproj-m-f16.gguf"
    assert (tmp_path / "mmproj-m-f16.gguf.llmc.json").is_file()
    reader = GGUFReader(beside)
    assert field(reader, "general.architecture") == "clip"
    assert {t.tensor_type.name for t in reader.tensors} == {"F16", "F32"}
    with pytest.raises(UserError, match="converter failed on n"):
        export(build("llama", tmp_path / "n"), mmproj="f16")
    assert not list(tmp_path.glob("*n.gguf*"))


PROBE = """
import sys
sys.path[:0] = [sys.argv[1] + "/gguf-py", sys.argv[1], sys.argv[3]]
from pathlib import Path
import conversion, launcher
print(launcher.has_mtp(conversion.get_model_class("Qwen3_5ForCausalLM"), Path(sys.argv[2])))
"""


@needs_converter
def test_whether_a_folder_has_layers_for_several_tokens_is_asked_of_the_converter(tmp_path, monkeypatch):
    """transformers leaves these layers out when it saves; llama.cpp's converter stops without them or without an option."""
    monkeypatch.setitem(tiny.FAMILIES, "qwen3_5_text", DELTA)
    folder = build("qwen3_5_text", tmp_path / "m", hidden_size=128)
    words = [sys.executable, "-c", PROBE, str(find_converter()), str(folder), str(run_converter.LAUNCHER.parent)]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "False\n"
    with edit_tensors(folder) as tensors:
        tensors["mtp.fc.weight"] = torch.zeros(128, 256)
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "True\n"


@needs_converter
def test_kinds_of_layers_keep_the_words_of_the_hub(tmp_path):
    """Granite 4 H says "mamba" and "attention". transformers 5 hands the converter other words, which it does not know."""
    folder = architectures.build("granitemoehybrid", tmp_path / "m")
    tiny.edit_config(folder, layer_types=["mamba", "attention", "mamba"])
    assert export(folder, float_type="f32")["logits"]["mean_kld"] < 1e-8


@needs_converter
def test_stacked_experts_are_stacked_again_for_the_converter(tmp_path):
    """Each expert has codes of its own in a quantized folder; the converter knows the tensor of all experts."""
    folder = mixtures.build("granitemoe", tmp_path / "m")
    llmc.quantize(folder, method="rtn", out=tmp_path / "q")
    report = export(tmp_path / "q")
    assert report["tensor_types"]["Q4_0"] == 2 * 7  # four of attention, and gate, up and down of the experts
    assert report["logits"]["mean_kld"] < 1e-3
