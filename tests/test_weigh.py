"""Weights by class: embedding, head, attention, MLP, other."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from llmc.families.names import CLASSES, classify
from llmc.formats.artifacts.table import artifact_at


@pytest.mark.parametrize(("name", "kind"), [
    ("model.embed_tokens.weight", "embedding"), ("transformer.wte.weight", "embedding"), ("token_embd.weight", "embedding"),
    ("model.decoder.embed_positions.weight", "embedding"), ("gpt_neox.embed_in.weight", "embedding"),
    ("lm_head.weight", "head"), ("output.weight", "head"), ("embed_out.weight", "head"), ("output_norm.weight", "other"),
    ("model.layers.0.self_attn.o_proj.weight", "attention"), ("blk.3.attn_output.weight", "attention"),
    ("gpt_neox.layers.0.attention.query_key_value.weight", "attention"), ("blk.0.attn_norm.weight", "other"),
    ("model.layers.0.self_attn.q_norm.weight", "other"), ("h.0.attn.c_attn", "attention"), ("blk.0.ffn_up.weight", "mlp"),
    ("model.layers.0.mlp.gate_proj.weight", "mlp"), ("model.decoder.layers.1.fc2.weight", "mlp"),
    ("model.layers.0.post_attention_layernorm.weight", "other"), ("model.norm.weight", "other"), ("h.0.ln_1.bias", "other"),
    ("model.decoder.layers.0.self_attn_layer_norm.weight", "other"), ("blk.0.ffn_norm.weight", "other"),
])
def test_classes(name: str, kind: str) -> None:
    assert classify(name) == kind


def test_weights_of_one_model_in_three_forms(made: SimpleNamespace) -> None:
    base, folder, file = (artifact_at(p).weigh() for p in (made.base, made.gptq, made.gguf))
    assert base["parameters"] == folder["parameters"] == file["parameters"]
    for w in (base, folder, file):
        assert sum(c["bytes"] for c in w["classes"].values()) == w["tensor_bytes"] < w["file_bytes"]
        assert sum(w["types"].values()) == w["tensor_bytes"]
        assert [w["classes"][k]["parameters"] for k in CLASSES] == [base["classes"][k]["parameters"] for k in CLASSES]
    assert base["bits_per_weight"] == 16
    assert file["decoder_bits_per_weight"] == 4.5
    assert base["tied"]
