"""ONNX export of the architectures that onnxruntime-genai's model builder knows: each against torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rounding import gptq_folder
from tiny import COMMON, FAMILIES, build, edit_config, edit_tensors

pytest.importorskip("onnxruntime_genai")
pytest.importorskip("onnx_ir")
import onnx
from onnx_files import FLOAT_NOISE, exact_int8, export

import llmc
from llmc.errors import UserError
from llmc.export.onnx import builder
from llmc.export.onnx.norms import norm_of
from llmc.formats.onnx_folder import attributes, open_onnx
from llmc.formats.types import IntegerType
from llmc.runtimes.onnx_model import OnnxModel
from llmc.runtimes.torch_model import TorchModel

GRANITE = {"embedding_multiplier": 12.0, "attention_multiplier": 0.3, "logits_scaling": 8.0, "residual_multiplier": 0.22}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [4, 2, 2],
         "mrope_interleaved": True}
DELTA_NET = {"head_dim": 32, "num_hidden_layers": 3,
             "layer_types": ["linear_attention", "linear_attention", "full_attention"],
             "linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
             "rope_parameters": MROPE}
GEMMA4 = {"head_dim": 32, "global_head_dim": 64, "num_global_key_value_heads": 1, "num_hidden_layers": 3,
          "layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "sliding_window": 32}
YARN: dict[str, Any] = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
SHORT_CONV = {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}
DENSE: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 32, "hidden_size": 128},  # whose root is no number of two decimals
    "gemma4_unified_text": GEMMA4,
    "gemma4_unified_text keys as values": {**GEMMA4, "attention_k_eq_v": True},
    "granite": GRANITE,
    "granitemoehybrid": {**GRANITE, "num_local_experts": 0, "shared_intermediate_size": 96, "position_embedding_type": "rope",
                         "layer_types": ["attention", "attention"]},
    "granitemoehybrid without positions": {**GRANITE, "num_local_experts": 0, "shared_intermediate_size": 96,
                                           "position_embedding_type": "nope", "layer_types": ["attention", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 32},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layer_interval": 2},
    "ministral3": {"head_dim": 32,
                   "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1, "mscale": 1.0, "mscale_all_dim": 1.0}},
    "ernie4_5": {"head_dim": 32},
    "olmo": {"clip_qkv": 0.3},
    "nemotron": {"head_dim": 32},
    "phi": {"num_key_value_heads": 4, "hidden_size": 128, "partial_rotary_factor": 0.5},
    "llama with yarn": {"rope_parameters": YARN},
    "llama with a linear scale": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}},
}
DENSE |= {"lfm2": SHORT_CONV, "qwen3_5_text": DELTA_NET}


@pytest.mark.parametrize("name", DENSE)
def test_every_architecture_gives_torchs_logits(name: str, tmp_path: Path) -> None:
    folder = build(name.partition(" ")[0], tmp_path / "m", **DENSE[name])
    gptq_folder(folder, tmp_path / "q", IntegerType(4, 32))
    report = export(tmp_path / "q")
    assert report["logits"]["relative_error"] < FLOAT_NOISE
    assert report["logits"]["top1_agreement"] == 1.0
    assert report["generated_tokens"] > 0
    assert report["verified"]["code_matrices"] > 0
    # in pieces, as a chat runs: the cache holds what the layers need
    ids, runtime = np.random.default_rng(0).integers(2, 512, 60), OnnxModel(tmp_path / "q-onnx", 64, 1)
    whole = runtime.logits(ids)
    runtime.prefill(ids[:-3])
    steps = np.stack([runtime.decode(int(i)) for i in ids[-3:]])
    assert np.abs(steps - whole[-3:]).max() < 1e-4 * np.abs(whole).max()


MIXTURES: dict[str, dict[str, Any]] = {
    "lfm2_moe": {**SHORT_CONV, "num_experts": 4, "num_experts_per_tok": 2, "num_dense_layers": 1,
                 "moe_intermediate_size": 64},
    "qwen3_5_moe_text": {**DELTA_NET, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
                         "shared_expert_intermediate_size": 64, "style": "qwen2"},
    "gpt_oss": {"head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32},
}


@pytest.mark.parametrize(("name", "options", "operator"), [
    *((name, {"bits": 4}, "QMoE") for name in MIXTURES), ("lfm2_moe", {"bits": 4, "sym": False}, "QMoE"),
    ("gpt_oss", {"bits": 8}, "MoE"), ("qwen3_5_moe_text", {"bits": 4, "int4": "qdq"}, "MoE")])
def test_experts_keep_their_codes(name: str, options: dict[str, Any], operator: str, tmp_path: Path) -> None:
    """In one operator for all experts of a layer: QMoE for 4 bits, which computes with the codes; else MoE."""
    folder, form = build(name, tmp_path / "m", **MIXTURES[name]), options.pop("int4", "nbits")
    llmc.quantize(folder, method="rtn", group_size=32, out=tmp_path / "q", **options)
    report = export(tmp_path / "q", int4=form)
    assert report["logits"]["relative_error"] < FLOAT_NOISE
    assert report["generated_tokens"] > 0
    bits, experts = options["bits"], sum(MIXTURES[name].get(n, 0) for n in ("num_experts", "num_local_experts"))
    model = onnx.load(tmp_path / "q-onnx" / "model.onnx", load_external_data=False)
    operators = [n for n in model.graph.node if n.op_type in ("MoE", "QMoE")]
    assert {n.op_type for n in operators} == {operator}
    shapes = {t.name: t.dims for t in model.graph.initializer}
    levels = {attributes(n)["accuracy_level"] for n in operators if n.op_type == "QMoE"}
    assert levels == ({0} if operator == "QMoE" else set())
    if operator == "QMoE":
        assert shapes[operators[0].input[2]] == [experts, 2 * (128 if name == "gpt_oss" else 64), 64 * bits // 8]
        edited = open_onnx(tmp_path / "q-onnx").edit(level=4).proto.graph.node
        assert {attributes(n)["accuracy_level"] for n in edited if n.op_type == "QMoE"} == {4}
    assert report["verified"]["code_weights"] > experts * 3 * 64 * 64


@pytest.mark.parametrize(("name", "dtype"), [("gpt_oss", "fp16"), ("lfm2_moe", "int8"),
                                             pytest.param("lfm2_moe", "w8a8", marks=exact_int8)])
def test_float_experts(name: str, dtype: str, tmp_path: Path) -> None:
    report = export(build(name, tmp_path / "m", **MIXTURES[name]), dtype=dtype)
    assert report["logits"]["relative_error"] < (2e-3 if dtype == "w8a8" else FLOAT_NOISE)
    assert "fp32" in report["forms"], "a router chooses the same experts"


def test_experts_of_two_types_in_a_layer_are_named(tmp_path: Path) -> None:
    folder = build("lfm2_moe", tmp_path / "m", **MIXTURES["lfm2_moe"])
    gptq_folder(folder, tmp_path / "q", IntegerType(4, 32), lambda n: "experts.2" not in n and n.endswith("w2.weight"))
    with pytest.raises(UserError, match=r"one type for all experts of a layer, but those of .* have fp16 and int4-sym-g32"):
        export(tmp_path / "q")


VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
          "patch_size": 14}
WHOLE = {**MROPE, "partial_rotary_factor": 1.0}
QWEN_VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
               "num_position_embeddings": 16, "deepstack_visual_indexes": []}
MULTIMODAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # {model type: (text config, rest of the config)}
    "gemma3": (FAMILIES["gemma3_text"], {"vision_config": VISION, "mm_tokens_per_image": 4}),
    "gemma4_unified": (GEMMA4, {}),
    "lfm2_vl": ({**SHORT_CONV, "model_type": "lfm2"},
                {"vision_config": {**VISION, "model_type": "siglip2_vision_model", "num_patches": 16}}),
    "mistral3": ({**DENSE["ministral3"], "model_type": "ministral3"},
                 {"vision_config": {**VISION, "model_type": "pixtral", "head_dim": 16}}),
    "qwen2_5_vl": ({"rope_parameters": WHOLE}, {"vision_config": QWEN_VISION}),
    "qwen3_vl": ({"rope_parameters": WHOLE, "head_dim": 16}, {"vision_config": QWEN_VISION}),
    "qwen3_5": (DELTA_NET, {"vision_config": QWEN_VISION}),
}


@pytest.mark.parametrize("name", MULTIMODAL)
def test_the_language_model_of_a_multimodal_folder(name: str, tmp_path: Path) -> None:
    text, rest = MULTIMODAL[name]
    folder = build(name, tmp_path / "m", text_config={**COMMON, **text}, style="qwen2" if "qwen" in name else None, **rest)
    report = export(folder, dtype="fp32")
    # Qwen3.5's recurrence adds up roundings: 1.02e-5 on a CPU without VNNI, whose sums have another order
    assert report["logits"]["relative_error"] < 2 * FLOAT_NOISE
    assert report["generated_tokens"] > 0
    assert any("the language model alone" in n for n in report["notes"])


def test_layers_that_draft_tokens_are_left_out(tmp_path: Path) -> None:
    folder = build("qwen3_5_text", tmp_path / "m", **DELTA_NET)
    with edit_tensors(folder) as tensors:
        tensors["mtp.fc.weight"] = torch.zeros(64, 128)
    assert export(folder, dtype="fp32")["logits"]["relative_error"] < FLOAT_NOISE
    with edit_tensors(folder) as tensors:
        tensors["model.layers.0.other.weight"] = torch.zeros(64, 128)
    with pytest.raises(UserError, match=r"model.layers.0.other.weight of .* has no place in the model"):
        export(folder, dtype="fp32", out=tmp_path / "x")


def test_the_builders_own_text_says_what_is_known() -> None:
    assert len(builder.known()) > 30
    assert builder.name_of({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}) == "LlamaForCausalLM"
    text = {"architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text"}
    assert builder.name_of(text) == "Qwen3_5ForConditionalGeneration", "it is the text part of that"
    assert builder.name_of({"model_type": "granite"}) == "GraniteForCausalLM"


@pytest.mark.parametrize(("family", "options", "reason"), [
    ("gemma4_text", {**GEMMA4, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 512},
     "no place for model.embed_tokens_per_layer"),
    ("granitemoehybrid", {**GRANITE, "num_local_experts": 0, "shared_intermediate_size": 96, "mamba_n_heads": 8,
                          "mamba_d_head": 16, "layer_types": ["mamba", "attention"]}, "layer 0 has no attention"),
])
def test_what_the_builder_has_no_code_for_is_said_in_a_line(family: str, options: dict[str, Any], reason: str,
                                                            tmp_path: Path) -> None:
    with pytest.raises(UserError) as e:
        export(build(family, tmp_path / "m", **options))
    assert "onnxruntime-genai's model builder" in e.value.problem
    assert reason in e.value.problem
    assert not (tmp_path / "m-onnx").exists()


@pytest.mark.parametrize("family", ["mistral", "phi3", "gemma3_text"])
def test_a_sliding_window_is_applied(family: str, tmp_path: Path) -> None:
    folder = build(family, tmp_path / "m", sliding_window=24)
    report = export(folder, dtype="fp32")
    assert not any("sliding window" in n for n in report["notes"])
    ids = np.random.default_rng(0).integers(2, 512, 100)
    ours = TorchModel(folder, context=128, threads=1).logits(ids)
    assert np.abs(ours - OnnxModel(tmp_path / "m-onnx", 128, 1).logits(ids)).max() < 1e-4
    edit_config(folder, sliding_window=128)
    wide = TorchModel(folder, context=128, threads=1).logits(ids)
    assert np.abs(ours - wide).max() > 0.1, "the text is long enough to tell"


def test_the_context_ends_where_queries_are_scaled(tmp_path: Path) -> None:
    folder = build("ministral3", tmp_path / "m", **DENSE["ministral3"])
    report = export(folder, dtype="fp32")
    assert any("scales queries beyond 64 tokens" in n for n in report["notes"])
    assert OnnxModel(tmp_path / "m-onnx", 256, 1).context == 64


def test_the_kind_of_a_norm_is_measured() -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.olmo.modeling_olmo import OlmoLayerNorm

    layer = torch.nn.LayerNorm(64, eps=3e-4)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    for module, centred, epsilon in ((LlamaRMSNorm(64, eps=1e-6), False, 1e-6), (layer, True, 3e-4),
                                     (OlmoLayerNorm(64), True, 1e-5)):  # which does not tell its epsilon
        kind = norm_of(module, 64)
        assert (kind.centred, kind.epsilon) == (centred, pytest.approx(epsilon))


@pytest.mark.parametrize(("family", "sizes"), [
    ("phi3", {"hidden_size": 256, "intermediate_size": 128}),  # [q; k; v] has as many rows as the head
    ("llama", {"intermediate_size": 512}), ("gemma3_text", {"intermediate_size": 512})])
def test_a_linear_with_as_many_rows_as_the_vocabulary_is_not_the_head(family: str, sizes: dict[str, Any],
                                                                      tmp_path: Path) -> None:
    """The builder takes it for the head: it gave its rows to lm_head."""
    folder = build(family, tmp_path / "m", **sizes)
    report = llmc.export(folder, format="onnx", dtype="fp32", out=tmp_path / "o")
    assert report["logits"]["relative_error"] < 1e-5
    llmc.quantize(folder, method="rtn", out=tmp_path / "q")
    report = llmc.export(tmp_path / "q", format="onnx", out=tmp_path / "oq")
    assert report["logits"]["relative_error"] < 1e-5
