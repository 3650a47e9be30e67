"""The role and class of a tensor, found from its name, in a checkpoint or GGUF file of any model, even without a table row.

The roles of linears are llama.cpp's names. tests/test_families.py compares them with the rows and the gguf package.
"""

from __future__ import annotations

import re

# role: the end of the linear's name in transformers; the first match counts
ROLES = {
    "attn_qkv": r"qkv_proj|c_attn|query_key_value|Wqkv",
    "attn_v": r"v_proj", "attn_k": r"k_proj", "attn_q": r"q_proj",
    "attn_output": r"o_proj|out_proj|attn\.c_proj|attention\.dense|attn\.dense",
    "ffn_down": r"down_proj|mlp\.c_proj|dense_4h_to_h|fc2|w2",
    "ffn_gate": r"gate_proj|w1",
    "ffn_up": r"up_proj|c_fc|dense_h_to_4h|fc1|w3",
}

CLASSES = ("embedding", "head", "attention", "mlp", "other")
# The first match counts. `other` is for norms and for names without a rule. Hugging Face names come before GGUF names.
_RULES = (
    ("other", r"norm|\bln_|rope_freqs|rotary"),
    ("embedding", r"\bembed_tokens\b|\bembed_positions\b|\bembed_in\b|\bwte\b|\bwpe\b|token_embd|position_embd"),
    ("head", r"\blm_head\b|\bembed_out\b|^output\.|^output$"),
    ("attention", r"attn|attention"),
    ("mlp", r"\bmlp\b|\bffn|\bfc[12]\b|feed_forward|experts|moe"),
)


def role_of(linear: str) -> str:
    """The role of a linear, one of ROLES, from its name in transformers; 'other' if the name is not known."""
    return next((role for role, ends in ROLES.items() if re.search(rf"(?:^|[._])(?:{ends})$", linear)), "other")


def classify(name: str) -> str:
    """The class of a tensor, one of CLASSES, from its Hugging Face or llama.cpp name."""
    return next((kind for kind, pattern in _RULES if re.search(pattern, name)), "other")
