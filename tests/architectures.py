"""Tiny configs of architectures whose layers differ: mixed kinds in one model, more arguments than hidden states, states with
more axes, weights that are used without a call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import COMMON, randomized, tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

MAMBA2: dict[str, Any] = {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1,
                          "mamba_d_state": 32, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_chunk_size": 16}
MOE: dict[str, Any] = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
GEMMA: dict[str, Any] = {
    "num_hidden_layers": 5, "head_dim": 16, "vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 32,
    "sliding_window": 16, "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]}

# Dense: every matrix of the layers is a linear, or stays a float by a rule
DENSE: dict[str, dict[str, Any]] = {
    "bloom": {"num_hidden_layers": 3, "n_head": 4},
    "xglm": {"d_model": 64, "ffn_dim": 128, "num_hidden_layers": 3, "attention_heads": 4},
    "openai-gpt": {"n_embd": 64, "num_hidden_layers": 3, "n_head": 4, "n_positions": 256},
    "rwkv": {"num_hidden_layers": 3, "attention_hidden_size": 64, "context_length": 256},
    "gemma3n_text": {**GEMMA, "altup_num_inputs": 4, "laurel_rank": 32,
                     "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0, 0.0]},
    "gemma4_text": {**GEMMA, "global_head_dim": 32},
    "mamba": {"state_size": 16, "time_step_rank": 32, "expand": 2, "num_hidden_layers": 3},
    "falcon_mamba": {"state_size": 16, "time_step_rank": 32, "expand": 2, "num_hidden_layers": 3},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 32, "n_groups": 1, "chunk_size": 16, "expand": 2,
               "num_hidden_layers": 3},
    "lfm2": {"num_hidden_layers": 3, "block_ff_dim": 128, "block_auto_adjust_ff_dim": False,
             "layer_types": ["conv", "full_attention", "conv"]},
    "qwen3_5_text": {"num_hidden_layers": 4, "head_dim": 32, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
                     "linear_num_key_heads": 2, "linear_num_value_heads": 4,
                     "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"]},
    "falcon_h1": {"num_hidden_layers": 3, **MAMBA2, "head_dim": 16},
    "granitemoehybrid": {"num_hidden_layers": 3, **MAMBA2, "num_local_experts": 0, "num_experts_per_tok": 0,
                         "shared_intermediate_size": 128, "layer_types": ["mamba", "attention", "mamba"],
                         "position_embedding_type": "nope"},
    "bamba": {"num_hidden_layers": 3, **MAMBA2, "attn_layer_indices": [1]},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 16,
                        "block_types": ["recurrent", "recurrent", "attention"], "num_key_value_heads": 1},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 32, "n_groups": 1, "chunk_size": 16,
                   "head_dim": 16, "layers_block_type": ["mamba", "mlp", "attention", "mamba"], "num_hidden_layers": 4},
}

# Layers that share weights
TIED: dict[str, dict[str, Any]] = {
    "zamba2": {"num_hidden_layers": 4, "mamba_d_state": 16, "mamba_ngroups": 1, "n_mamba_heads": 8, "mamba_headdim": 16,
               "chunk_size": 16, "num_mem_blocks": 1, "use_shared_attention_adapter": False, "adapter_rank": 8,
               "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
}

# Mixtures of experts
MIXED: dict[str, dict[str, Any]] = {
    "jamba": {"num_hidden_layers": 4, "mamba_d_state": 16, "mamba_dt_rank": 32, "mamba_expand": 2, **MOE,
              "attn_layer_period": 4, "attn_layer_offset": 2, "expert_layer_period": 2, "expert_layer_offset": 1},
    "zaya": {"num_hidden_layers": 4, "head_dim": 16, **MOE, "num_experts_per_tok": 1},
    "llama4_text": {"num_hidden_layers": 4, "head_dim": 16, "intermediate_size_mlp": 128,
                    "interleave_moe_layer_step": 2, **MOE},
    "dbrx": {"d_model": 64, "n_heads": 4, "n_layers": 3, "max_seq_len": 256,
             "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
             "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}},
    "lfm2_moe": {"num_hidden_layers": 4, "num_dense_layers": 1, **MOE,
                 "layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "qwen3_next": {"num_hidden_layers": 4, "head_dim": 32, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
                   "linear_num_key_heads": 2, "linear_num_value_heads": 4, "shared_expert_intermediate_size": 64, **MOE,
                   "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"]},
}


def build(kind: str, folder: Path) -> Path:
    """Write a tiny model of an architecture of the tables above, with a tokenizer; returns the folder."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**COMMON, **{**DENSE, **TIED, **MIXED}[kind]})
    randomized(AutoModelForCausalLM.from_config(config)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
