"""Tiny mixtures of experts, one of each kind of code and of names: experts in tensors of their own or stacked, renamed, with
biases, transposed, without a gate, beside shared experts and dense layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import COMMON, randomized, tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

ROUTED: dict[str, Any] = {"num_hidden_layers": 2, "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8,
                          "num_experts_per_tok": 2, "moe_intermediate_size": 64}
SHARED: dict[str, Any] = {**ROUTED, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
LATENT: dict[str, Any] = {**SHARED, "num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 16,
                          "qk_rope_head_dim": 16, "v_head_dim": 16}
DELTA: dict[str, Any] = {**ROUTED, "shared_expert_intermediate_size": 64, "head_dim": 32, "linear_num_key_heads": 2,
                         "linear_num_value_heads": 8, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
                         "layer_types": ["linear_attention", "full_attention"]}
NARROW: dict[str, Any] = {**ROUTED, "intermediate_size": 64}

MIXTURES: dict[str, dict[str, Any]] = {
    "qwen2_moe": {**ROUTED, "shared_expert_intermediate_size": 64, "decoder_sparse_step": 1},
    "qwen3_moe": {**ROUTED, "head_dim": 16},
    "qwen3_next": DELTA,
    "qwen3_5_moe_text": DELTA,
    "mixtral": NARROW,
    "olmoe": NARROW,
    "phimoe": NARROW,
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "glm4_moe": {**SHARED, "head_dim": 16},
    "dots1": SHARED,
    "ernie4_5_moe": {**ROUTED, "moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    "lfm2_moe": {**ROUTED, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "granitemoe": NARROW,
    "granitemoe_swa": NARROW,
    "granitemoehybrid": {**NARROW, "shared_intermediate_size": 64, "layer_types": ["mamba", "attention"], "mamba_n_heads": 8,
                         "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_expand": 2},
    "gpt_oss": {**NARROW, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32},
    "gemma4_text": {**ROUTED, "head_dim": 16, "global_head_dim": 32, "enable_moe_block": True, "top_k_experts": 2,
                    "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "sliding_window": 32,
                    "layer_types": ["sliding_attention", "full_attention"]},
    "llama4_text": {**ROUTED, "intermediate_size_mlp": 128, "intermediate_size": 64, "head_dim": 16, "moe_layers": [1],
                    "num_experts_per_tok": 1},
    "minimax_m2": {**NARROW, "head_dim": 16, "rotary_dim": 8},
    "nemotron_h": {**ROUTED, "num_hidden_layers": 3, "layers_block_type": ["mamba", "moe", "attention"], "head_dim": 16,
                   "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1, "n_shared_experts": 1,
                   "moe_shared_expert_intermediate_size": 64},
}
STACKED = ("granitemoe", "granitemoe_swa", "granitemoehybrid", "gpt_oss", "gemma4_text", "llama4_text")  # in the files too


def model(kind: str) -> Any:
    """A random model of the table."""
    torch.manual_seed(0)
    return randomized(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**COMMON, **MIXTURES[kind]})))


def build(kind: str, folder: Path) -> Path:
    """Write a model of the table as the hub has it, with a tokenizer; returns the folder."""
    model(kind).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
