"""Rotary embeddings that depend on the length of the text. The graph has the embedding of short texts, which does not.

'longrope' (Phi-3's 128k models; 'su' is its older name) has one set of factors up to original_max_position_embeddings and
another beyond. 'dynamic' changes its base beyond max_position_embeddings. transformers computes every position of a text with
the set for the text's whole length. So a cache that was computed with the first set is wrong beyond its limit. Therefore the
context of the file ends at that limit.
"""

from __future__ import annotations

from typing import Any

BY_LENGTH = ("dynamic", "longrope", "su")


def by_length(config: dict[str, Any]) -> str | None:
    """The rope type in a config.json if it depends on the text's length, else None."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type"))
    return kind if kind in BY_LENGTH else None


def context_of(config: dict[str, Any]) -> tuple[int, str | None]:
    """The context length of the graph, in tokens, and a note if the model's own is longer."""
    whole, kind = int(config["max_position_embeddings"]), by_length(config)
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    first = config.get("original_max_position_embeddings") or scaling.get("original_max_position_embeddings") or whole
    if scaling.get("llama_4_scaling_beta") and int(first) < whole:  # Ministral 3
        return int(first), (f"the model scales queries beyond {first} tokens, which the graph does not: the context of the "
                            f"file ends there, not at the model's {whole}")
    if kind in (None, "dynamic") or int(first) >= whole:
        return whole, None
    return int(first), (f"the rotary embedding ({kind}) changes beyond {first} tokens, and a graph has only one: the context "
                        f"of the file ends there, not at the model's {whole}; a GGUF file (--format gguf) has both")
