"""The size of a KV cache: keys and values of every layer for every token of the context.

Artifact.kv_shape reads the shape from an artifact.
"""

from __future__ import annotations

from typing import Any, TypedDict

# bytes of one element; q8_0: 32 int8 codes and a float16 scale
BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "int8": 1.0, "uint8": 1.0}
CONTEXTS = (2048, 8192)


class KvShape(TypedDict):
    """The shape of a cache."""

    layers: int  # with a cache
    kv_heads: int
    head_dim: int
    window: int | None  # tokens that a sliding layer keeps; None: no layer slides
    sliding_layers: int


class KvDescribed(KvShape):
    """A shape, and its bytes in f16."""

    bytes_per_token_f16: int
    bytes_at: dict[str, int]  # {number of tokens: bytes}, for CONTEXTS


class KvUse(TypedDict):
    """The cache of a run."""

    type: str  # of its elements
    bytes_per_token: int | None  # None: the shape is unknown
    bytes_at: dict[str, int] | None  # {number of tokens: bytes}, for CONTEXTS


def shape_of_config(config: dict[str, Any]) -> KvShape | None:
    """The cache shape from a Hugging Face config, also with GPT-2's key names. None if the config does not state it, or
    if the model uses latent attention."""
    def first(*names: str) -> Any:
        return next((config[n] for n in names if config.get(n) is not None), None)

    layers, heads = first("num_hidden_layers", "n_layer"), first("num_attention_heads", "n_head")
    hidden = first("hidden_size", "n_embd")
    if not layers or not heads or "kv_lora_rank" in config:
        return None
    head_dim = first("head_dim") or (hidden // heads if hidden else None)
    if not head_dim:
        return None
    kinds = config.get("layer_types") or ["full_attention"] * layers
    sliding = kinds.count("sliding_attention")
    return {
        "layers": sum(kind.endswith("attention") and not kind.startswith("linear") for kind in kinds),
        "kv_heads": first("num_key_value_heads") or heads, "head_dim": head_dim,
        "window": config.get("sliding_window") if sliding else None, "sliding_layers": sliding,
    }


def described(known: KvShape | None) -> KvDescribed | None:
    """A shape, and its bytes in f16."""
    return None if known is None else {"bytes_per_token_f16": bytes_at(known, 1, "f16"), **known,
                                       "bytes_at": {str(n): bytes_at(known, n, "f16") for n in CONTEXTS}}


def bytes_at(known: KvShape, context: int, type: str) -> int:
    """Bytes of a cache of this shape that holds `context` tokens. type: a key of BYTES."""
    full = known["layers"] - known["sliding_layers"]
    tokens = full * context + known["sliding_layers"] * min(context, known["window"] or context)
    return round(2 * tokens * known["kv_heads"] * known["head_dim"] * BYTES[type])


def section(known: KvShape | None, type: str) -> KvUse:
    """The KV cache section of a report. Sizes are None if unknown."""
    if known is None or type not in BYTES:
        return {"type": type, "bytes_per_token": None, "bytes_at": None}
    return {"type": type, "bytes_per_token": bytes_at(known, 1, type),
            "bytes_at": {str(n): bytes_at(known, n, type) for n in CONTEXTS}}


def section_text(section: KvUse) -> str:
    """A `section` as text: 'f16: 46.1 kB a token, 94.4 MB at 2048, 377.5 MB at 8192'."""
    from llmc.console import size

    if section["bytes_at"] is None or section["bytes_per_token"] is None:
        return f"{section['type']}: of unknown size"
    at = [f"{size(n)} at {context}" for context, n in section["bytes_at"].items()]
    return f"{section['type']}: {size(section['bytes_per_token'])} a token, {', '.join(at)}"
