"""Rotary embeddings that depend on the length of the text: a graph holds those of the texts for which nothing depends on it.

'longrope' (Phi-3's 128k models; 'su' is its older name) has one set of factors up to original_max_position_embeddings and
another beyond; 'dynamic' changes its base beyond max_position_embeddings. transformers computes every position of a text with
the set that its whole length asks for, so a cache that has passed the border is not that of a longer text: the context of the
file ends there instead.
"""

from __future__ import annotations

from typing import Any

BY_LENGTH = ("dynamic", "longrope", "su")


def by_length(config: dict[str, Any]) -> str | None:
    """The kind of a config.json's rotary embedding where it depends on the length."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type"))
    return kind if kind in BY_LENGTH else None


def context_of(config: dict[str, Any]) -> tuple[int, str | None]:
    """The most tokens that a graph may be given, and what to say where the model was made for more."""
    whole, kind = int(config["max_position_embeddings"]), by_length(config)
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    first = config.get("original_max_position_embeddings") or scaling.get("original_max_position_embeddings") or whole
    if kind in (None, "dynamic") or int(first) >= whole:
        return whole, None
    return int(first), (f"the rotary embedding ({kind}) changes beyond {first} tokens, and a graph has one: the context of "
                        f"the file ends there, not at the model's {whole}; a GGUF (--format gguf) has both")
