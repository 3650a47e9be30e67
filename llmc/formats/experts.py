"""Which weights of a mixture of experts a token uses.

A router sends each token to a few experts of a layer. All experts are in the file. Decoding reads only the chosen ones.
"""

from __future__ import annotations

import re
from typing import Any

# An expert's tensor: of GGUF 'blk.0.ffn_up_exps.weight' (all experts) and, in old files, 'blk.0.ffn_up.3.weight'; of Hugging
# Face 'mlp.experts.3.up_proj.weight' and 'mlp.experts.gate_up_proj', of Granite 'block_sparse_moe.input_linear'. Shared
# experts have other names: every token uses them.
_EXPERT = re.compile(r"_(?:ch)?exps\.|\bffn_(?:gate|up|down)\.\d+\.|\bexperts[./]|\bblock_sparse_moe\.(?:in|out)put_linear\b")
# Tables of which a token reads one row, also where the embedding is the head.
_ROWS = re.compile(r"per_layer_token_embd|embed_tokens_per_layer|position_embd|embed_positions|\bwpe\b|token_types")

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts", "n_experts")
USED = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_top_k", "moe_topk", "moe_k",
        "top_k_experts", "num_selected_experts")


def share(experts: Any, used: Any) -> float:
    """The share of the experts that a token uses, 0 to 1. It is 1 if a count is missing. Lists have a count for each layer:
    the largest counts."""
    total, chosen = (max(v, default=0) if isinstance(v, list) else v for v in (experts, used))
    if not isinstance(total, int) or not isinstance(chosen, int) or total < 1 or not 0 < chosen < total:
        return 1.0
    return chosen / total


def share_of_config(config: dict[str, Any]) -> float:
    """`share` by the counts in a Hugging Face config, which has many names for them."""
    experts, used = (next((config[k] for k in keys if config.get(k)), None) for keys in (EXPERTS, USED))
    return share(experts, used)


def chosen_of(config: dict[str, Any]) -> int | None:
    """The number of experts that a token takes, by a Hugging Face config; the smallest if layers differ, None if it has no
    such number."""
    found = next((config[k] for k in USED if config.get(k)), None)
    if isinstance(found, list):
        found = min((n for n in found if n), default=None)
    return found if isinstance(found, int) and found > 0 else None


def used_of(name: str, experts_share: float) -> float:
    """The share of a tensor that decoding a token reads, 0 to 1. A table of which one row is read counts as 0, except the
    token embedding, which may also be the head."""
    if _ROWS.search(name):
        return 0.0
    return experts_share if _EXPERT.search(name) else 1.0


def described(seen: dict[str, Any] | None) -> str:
    """The sentence on what the text gives to experts (`expected` of compress/expected.py); '' for a dense model."""
    if seen is None:
        return ""
    text = (f"{seen['tokens']:,} tokens reach {seen['chosen']} of {seen['experts']} experts each: on average "
            f"{seen['tokens_per_expert']:,.0f} tokens an expert, {seen['tokens_per_column']:.2g} per column of "
            f"{seen['columns']}")
    return text if seen["tokens_per_column"] >= 1 else f"{text} (1 per column takes {seen['tokens_for_one']:,} tokens)"
