"""The table: one row for each model family. A new row is usually a base row with some changes.

Tests run every family of tests/tiny.py against torch and so verify its row. If a command does not support a family, the field
of the row is empty (`gguf`), or a property gives the reason (`unrotatable`, `unnarrowable`).
"""

from __future__ import annotations

from dataclasses import replace

from llmc.families.row import GELU_TANH, Family, Gguf

LLAMA = Family(
    "llama", "LlamaForCausalLM",
    linears={"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
             "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
             "ffn_down": "mlp.down_proj"},
    attention_norm="input_layernorm", mlp_norm="post_attention_layernorm",
    gguf=Gguf("llama", interleaved=True, rope=("linear", "yarn", "llama3", "longrope"), seventy_from=2))
MISTRAL = replace(LLAMA, model_type="mistral", architecture="MistralForCausalLM")
QWEN2 = replace(LLAMA, model_type="qwen2", architecture="Qwen2ForCausalLM", gguf=Gguf("qwen2", seventy_from=1))
QWEN3 = replace(LLAMA, model_type="qwen3", architecture="Qwen3ForCausalLM", gguf=Gguf("qwen3"),
                head_norms=("self_attn.q_norm", "self_attn.k_norm"))
GEMMA2 = replace(
    LLAMA, model_type="gemma2", architecture="Gemma2ForCausalLM", mlp_norm="pre_feedforward_layernorm",
    post_norms=("post_attention_layernorm", "post_feedforward_layernorm"), offset=1.0, scaled_embedding=True,
    gguf=Gguf("gemma2", GELU_TANH, own_head=False, window="layers", wide_scale_layers=46,
              softcaps={"attn_logit_softcapping": True, "final_logit_softcapping": True}))
GEMMA3 = replace(
    GEMMA2, model_type="gemma3_text", architecture="Gemma3ForCausalLM", head_norms=QWEN3.head_norms,
    gguf=Gguf("gemma3", GELU_TANH, window="layers", wide_scale_layers=62, softcaps={"final_logit_softcapping": False},
              assumed={"attn_logit_softcapping": None, "use_bidirectional_attention": False}))
PHI3 = replace(
    LLAMA, model_type="phi3", architecture="Phi3ForCausalLM",
    linears={"attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj", "ffn_up": "mlp.gate_up_proj",
             "ffn_down": "mlp.down_proj"},
    # without the key, older versions of llama.cpp assume Phi-3-mini's window
    gguf=Gguf("phi3", window="key", rope=("linear", "yarn", "longrope"), partial_rotary=True))
GPT2 = Family(
    "gpt2", "GPT2LMHeadModel",
    linears={"attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
    attention_norm="ln_1", mlp_norm="ln_2", final_norm="ln_f", centred=True, gated=False, grouped=False, rotary=False,
    transposed=True,
    gguf=Gguf("gpt2", GELU_TANH, assumed={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}))
OPT = replace(
    GPT2, model_type="opt", architecture="OPTForCausalLM",
    linears={"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
             "attn_output": "self_attn.out_proj", "ffn_up": "fc1", "ffn_down": "fc2"},
    attention_norm="self_attn_layer_norm", mlp_norm="final_layer_norm", final_norm="decoder.final_layer_norm",
    transposed=False, gguf=Gguf())
GPT_NEOX = replace(
    GPT2, model_type="gpt_neox", architecture="GPTNeoXForCausalLM",
    linears={"attn_qkv": "attention.query_key_value", "attn_output": "attention.dense", "ffn_up": "mlp.dense_h_to_4h",
             "ffn_down": "mlp.dense_4h_to_h"},
    attention_norm="input_layernorm", mlp_norm="post_attention_layernorm", final_norm="final_layer_norm", qkv_by_head=True,
    rotary=True, transposed=False, gguf=Gguf())

ROWS = (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, PHI3, GPT2, OPT, GPT_NEOX)
