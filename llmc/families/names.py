"""What a tensor is for, told from its name alone: of any model, with a row in the table or without, in a checkpoint or GGUF.

The roles of linears have llama.cpp's words; tests/test_families.py holds them against the rows and the gguf package.
"""

from __future__ import annotations

import re

# role: how the linear's name ends in transformers; the first match wins
ROLES = {
    "attn_qkv": r"qkv_proj|c_attn|query_key_value|Wqkv",
    "attn_v": r"v_proj", "attn_k": r"k_proj", "attn_q": r"q_proj",
    "attn_output": r"o_proj|out_proj|attn\.c_proj|attention\.dense|attn\.dense",
    "ffn_down": r"down_proj|mlp\.c_proj|dense_4h_to_h|fc2|w2",
    "ffn_gate": r"gate_proj|w1",
    "ffn_up": r"up_proj|c_fc|dense_h_to_4h|fc1|w3",
}
_GGUF_MATRIX = re.compile(rf"blk\.\d+\.({'|'.join(ROLES)})(_exps)?\.weight")

CLASSES = ("embedding", "head", "attention", "mlp", "other")
# The first match wins; `other` is what is left: norms and what no rule knows. Hugging Face names, then GGUF names.
_RULES = (
    ("other", r"norm|\bln_|rope_freqs|rotary"),
    ("embedding", r"\bembed_tokens\b|\bembed_positions\b|\bembed_in\b|\bwte\b|\bwpe\b|token_embd|position_embd"),
    ("head", r"\blm_head\b|\bembed_out\b|^output\.|^output$"),
    ("attention", r"attn|attention"),
    ("mlp", r"\bmlp\b|\bffn|\bfc[12]\b|feed_forward|experts|moe"),
)


def role_of(linear: str) -> str:
    """One of ROLES for a linear by its name in transformers; 'other' where the name is not known."""
    return next((role for role, ends in ROLES.items() if re.search(rf"(?:^|[._])(?:{ends})$", linear)), "other")


def classify(name: str) -> str:
    """One of CLASSES for a tensor by its name, in Hugging Face's or llama.cpp's spelling."""
    return next((kind for kind, pattern in _RULES if re.search(pattern, name)), "other")


def is_layer_matrix(name: str) -> bool:
    """Whether a tensor of a GGUF file, by its name, is a matrix of a decoder layer that has a role, experts included."""
    return _GGUF_MATRIX.fullmatch(name) is not None
