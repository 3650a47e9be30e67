"""Sliding windows that a runtime does not apply. The checked text is too short to show it, so every exporter has a note."""

from __future__ import annotations

from typing import Any


def window_of(config: Any) -> tuple[int, int] | None:
    """(tokens, number of layers) of a model's sliding window. None if no layer has one that is shorter than the context.

    config: transformers' reading of config.json."""
    c = config.get_text_config()
    window = getattr(c, "sliding_window", None)
    if not window or window >= c.max_position_embeddings or not getattr(c, "use_sliding_window", True):
        return None
    kinds = getattr(c, "layer_types", None)
    layers = c.num_hidden_layers if kinds is None else list(kinds).count("sliding_attention")
    return (window, layers) if layers else None


def ignored(runtime: str, config: Any, applied: int) -> list[str]:
    """A note if the runtime applies a window in fewer layers than the model. applied: in how many it does."""
    window, layers = window_of(config) or (0, 0)
    if applied >= layers:
        return []
    where = "this architecture" if applied == 0 else f"{layers - applied} of {layers} layers of this model"
    return [f"{runtime} runs {where} with full attention; the model's sliding window of {window} tokens "
            "is not applied, so texts longer than that are computed differently"]
