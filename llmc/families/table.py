"""The table: one row for each model family. A new row is usually a base row with some changes.

Tests run every family of tests/tiny.py against torch and so verify its row. If a command does not support a family, the field
of the row is empty (`gguf`), or a property gives the reason (`unrotatable`, `unnarrowable`).
"""

from __future__ import annotations

from dataclasses import replace

from llmc.families.row import GELU, GELU_TANH, RELU2, Family, Gguf

LLAMA = Family(
    "llama", "LlamaForCausalLM",
    linears={"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
             "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
             "ffn_down": "mlp.down_proj"},
    attention_norm="input_layernorm", mlp_norm="post_attention_layernorm",
    gguf=Gguf("llama", interleaved=True, rope=("linear", "yarn", "llama3", "longrope"), seventy_from=2,
              values={"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}))
MISTRAL = replace(LLAMA, model_type="mistral", architecture="MistralForCausalLM")
QWEN2 = replace(LLAMA, model_type="qwen2", architecture="Qwen2ForCausalLM", gguf=Gguf("qwen2", seventy_from=1))
QWEN3 = replace(LLAMA, model_type="qwen3", architecture="Qwen3ForCausalLM", gguf=Gguf("qwen3"),
                head_norms=("self_attn.q_norm", "self_attn.k_norm"))
SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")
GEMMA2 = replace(
    LLAMA, model_type="gemma2", architecture="Gemma2ForCausalLM", mlp_norm="pre_feedforward_layernorm",
    post_norms=("post_attention_layernorm", "post_feedforward_layernorm"), offset=1.0, scaled_embedding=True,
    gguf=Gguf("gemma2", GELU_TANH, head="tied", window="layers", wide_scale_layers=46,
              values={name: name for name in SOFTCAPS}, required=SOFTCAPS))
GEMMA3 = replace(
    GEMMA2, model_type="gemma3_text", architecture="Gemma3ForCausalLM", head_norms=QWEN3.head_norms,
    gguf=Gguf("gemma3", GELU_TANH, window="layers", local_theta=True, wide_scale_layers=62, values={SOFTCAPS[1]: SOFTCAPS[1]},
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
    gguf=Gguf("gpt2", GELU_TANH, biased=True,
              assumed={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}))
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
    rotary=True, transposed=False,
    gguf=Gguf("gptneox", GELU, head="own", biased=True, partial_rotary=True, assumed={"attention_bias": True},
              values={"use_parallel_residual": "parallel_residual"}))

FALCON = replace(
    GPT_NEOX, model_type="falcon", architecture="FalconForCausalLM",
    linears={**GPT_NEOX.linears, "attn_qkv": "self_attention.query_key_value", "attn_output": "self_attention.dense"},
    mlp_norm=GPT_NEOX.attention_norm, final_norm="ln_f", grouped=True, unmapped="its sizes have norms of different names",
    gguf=Gguf("falcon", GELU, assumed={"alibi": False, "parallel_attn": True}))

# RMSNorm before attention and MLP, as Llama
FREQUENCIES = ("linear", "yarn", "llama3")  # where llama.cpp reads a factor for each frequency
SMOLLM3 = replace(LLAMA, model_type="smollm3", architecture="SmolLM3ForCausalLM",
                  gguf=Gguf("smollm3", interleaved=True, unrotated=4))
MINISTRAL3 = replace(LLAMA, model_type="ministral3", architecture="Ministral3ForCausalLM",
                     gguf=Gguf("mistral3", interleaved=True, rope=("linear", "yarn", "llama3", "longrope"), temperature=True))
GRANITE = replace(
    LLAMA, model_type="granite", architecture="GraniteForCausalLM",
    gguf=Gguf("granite", interleaved=True, rope=("linear", "yarn", "llama3", "longrope"), required=("logits_scaling",),
              values={"embedding_multiplier": "embedding_scale", "residual_multiplier": "residual_scale",
                      "attention_multiplier": "attention_scale", "logits_scaling": "logit_scale"}))
SEED_OSS = replace(LLAMA, model_type="seed_oss", architecture="SeedOssForCausalLM", gguf=Gguf("seed_oss"))
ERNIE4_5 = replace(LLAMA, model_type="ernie4_5", architecture="Ernie4_5ForCausalLM", gguf=Gguf("ernie4_5"))
HUNYUAN = replace(
    LLAMA, model_type="hunyuan_v1_dense", architecture="HunYuanDenseV1ForCausalLM",
    head_norms=("self_attn.query_layernorm", "self_attn.key_layernorm"),
    gguf=Gguf("hunyuan-dense", rope=("linear", "yarn", "ntk_alpha")))
GEMMA = replace(LLAMA, model_type="gemma", architecture="GemmaForCausalLM", offset=1.0, scaled_embedding=True,
                gguf=Gguf("gemma", GELU_TANH, head="tied", assumed={"use_bidirectional_attention": False}))
UNGATED = {role: linear for role, linear in LLAMA.linears.items() if role != "ffn_gate"}
ARCEE = replace(LLAMA, model_type="arcee", architecture="ArceeForCausalLM", linears=UNGATED, gated=False,
                gguf=Gguf("arcee", RELU2, interleaved=True, rope=FREQUENCIES))
XIELU = ("alpha_n", "alpha_p", "beta", "eps")
APERTUS = replace(
    ARCEE, model_type="apertus", architecture="ApertusForCausalLM", attention_norm="attention_layernorm",
    mlp_norm="feedforward_layernorm", head_norms=QWEN3.head_norms,
    gguf=Gguf("apertus", ("xielu",), head="own", rope=("linear", "yarn", "llama3", "longrope"),
              scalars={f"mlp.act_fn.{name}": f"xielu_{name}" for name in XIELU}))

# norms after attention and MLP, before the sum
OLMO2 = replace(
    LLAMA, model_type="olmo2", architecture="Olmo2ForCausalLM", attention_norm="", mlp_norm="",
    post_norms=GEMMA2.post_norms, head_norms=QWEN3.head_norms, gguf=Gguf("olmo2", head="own", window="layers"))
OLMO3 = replace(OLMO2, model_type="olmo3", architecture="Olmo3ForCausalLM")
EXAONE4 = replace(OLMO2, model_type="exaone4", architecture="Exaone4ForCausalLM",
                  gguf=Gguf("exaone4", rope=FREQUENCIES, window="layers", window_depth=64))
GLM4 = replace(
    LLAMA, model_type="glm4", architecture="Glm4ForCausalLM",
    linears={**UNGATED, "ffn_up": "mlp.gate_up_proj"},
    post_norms=("post_self_attn_layernorm", "post_mlp_layernorm"), gguf=Gguf("glm4", partial_rotary=True))

# LayerNorm
STABLELM = replace(LLAMA, model_type="stablelm", architecture="StableLmForCausalLM", centred=True,
                   gguf=Gguf("stablelm", head="own", partial_rotary=True))
STARCODER2 = replace(
    STABLELM, model_type="starcoder2", architecture="Starcoder2ForCausalLM", gated=False,
    linears={**UNGATED, "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}, gguf=Gguf("starcoder2", GELU, biased=True))
NEMOTRON = replace(STABLELM, model_type="nemotron", architecture="NemotronForCausalLM", linears=UNGATED, gated=False,
                   offset=1.0, gguf=Gguf("nemotron", RELU2, head="own", partial_rotary=True))
COHERE = replace(STABLELM, model_type="cohere", architecture="CohereForCausalLM", mlp_norm=LLAMA.attention_norm,
                 gguf=Gguf("command-r", head="tied", values={"logit_scale": "logit_scale"}))
COHERE2 = replace(COHERE, model_type="cohere2", architecture="Cohere2ForCausalLM",
                  gguf=Gguf("cohere2", head="tied", window="layers", values={"logit_scale": "logit_scale"}))
PHI = replace(
    NEMOTRON, model_type="phi", architecture="PhiForCausalLM", mlp_norm=LLAMA.attention_norm, offset=0.0,
    final_norm="final_layernorm",
    linears={**UNGATED, "attn_output": "self_attn.dense", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"},
    gguf=Gguf("phi2", GELU_TANH, head="own", biased=True, partial_rotary=True, assumed={"qk_layernorm": False}))

# layers of several kinds
EXPERTS = {"num_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
EXPERT_WIDTH = {"moe_intermediate_size": "expert_feed_forward_length"}
ATTENTION = {role: linear for role, linear in LLAMA.linears.items() if role.startswith("attn")}
MIXTRAL = replace(LLAMA, model_type="mixtral", architecture="MixtralForCausalLM", linears=ATTENTION,
                  experts="mlp")
QWEN2_MOE = replace(
    MIXTRAL, model_type="qwen2_moe", architecture="Qwen2MoeForCausalLM",
    gguf=Gguf("qwen2moe", head="own", assumed={"norm_topk_prob": False}, values={
        **EXPERTS, **EXPERT_WIDTH, "shared_expert_intermediate_size": "expert_shared_feed_forward_length"}))
QWEN3_MOE = replace(MIXTRAL, model_type="qwen3_moe", architecture="Qwen3MoeForCausalLM", head_norms=QWEN3.head_norms,
                    gguf=Gguf("qwen3moe", assumed={"norm_topk_prob": True}, values={**EXPERTS, **EXPERT_WIDTH}))
OLMOE = replace(MIXTRAL, model_type="olmoe", architecture="OlmoeForCausalLM", head_norms=QWEN3.head_norms,
                gguf=Gguf("olmoe", head="own", assumed={"norm_topk_prob": False, "clip_qkv": None}, values=EXPERTS))
LFM2 = replace(
    LLAMA, model_type="lfm2", architecture="Lfm2ForCausalLM", unmapped="its layers are of two kinds",
    linears={**LLAMA.linears, "attn_output": "self_attn.out_proj", "ffn_gate": "feed_forward.w1", "ffn_up": "feed_forward.w3",
             "ffn_down": "feed_forward.w2"},
    attention_norm="operator_norm", mlp_norm="ffn_norm", final_norm="embedding_norm",
    head_norms=("self_attn.q_layernorm", "self_attn.k_layernorm"),
    gguf=Gguf("lfm2", unattended="conv", assumed={"conv_bias": False}, values={"conv_L_cache": "shortconv_l_cache"}))

ROWS = tuple(row for row in list(globals().values()) if isinstance(row, Family))
