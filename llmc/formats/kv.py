"""What a KV cache takes: keys and values of every layer, for every token of the context.

An artifact tells its own shape: Artifact.kv_shape.
"""

from __future__ import annotations

from typing import Any, TypedDict

# bytes of one element; q8_0: 32 int8 codes and a float16 scale
BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "int8": 1.0, "uint8": 1.0}
CONTEXTS = (2048, 8192)


class KvShape(TypedDict):
    """The shape of a cache."""

    layers: int  # that have a cache
    kv_heads: int
    head_dim: int
    window: int | None  # tokens that sliding layers look back on; None: no layer slides
    sliding_layers: int


class KvDescribed(KvShape):
    """A shape, and what it takes in f16."""

    bytes_per_token_f16: int
    bytes_at: dict[str, int]  # bytes by the number of tokens, of CONTEXTS


class KvUse(TypedDict):
    """A cache that ran."""

    type: str  # of its elements
    bytes_per_token: int | None  # None: the artifact does not tell its shape
    bytes_at: dict[str, int] | None  # bytes by the number of tokens, of CONTEXTS


def shape_of_config(config: dict[str, Any]) -> KvShape | None:
    """The shape that a Hugging Face config tells; GPT-2's names are its own. None where it tells none: latent attention."""
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
    """A shape, and what it takes in f16."""
    return None if known is None else {"bytes_per_token_f16": bytes_at(known, 1, "f16"), **known,
                                       "bytes_at": {str(n): bytes_at(known, n, "f16") for n in CONTEXTS}}


def bytes_at(known: KvShape, context: int, type: str) -> int:
    """Bytes of a cache of this shape with `context` tokens in it."""
    full = known["layers"] - known["sliding_layers"]
    tokens = full * context + known["sliding_layers"] * min(context, known["window"] or context)
    return round(2 * tokens * known["kv_heads"] * known["head_dim"] * BYTES[type])


def section(known: KvShape | None, type: str) -> KvUse:
    """What a report says of the cache that ran."""
    if known is None or type not in BYTES:
        return {"type": type, "bytes_per_token": None, "bytes_at": None}
    return {"type": type, "bytes_per_token": bytes_at(known, 1, type),
            "bytes_at": {str(n): bytes_at(known, n, type) for n in CONTEXTS}}


def words(told: KvUse) -> str:
    """'f16: 46.1 kB a token, 94.4 MB at 2048, 377.5 MB at 8192' of a `section`."""
    from llmc.console import size

    if told["bytes_at"] is None or told["bytes_per_token"] is None:
        return f"{told['type']}: of unknown size"
    at = [f"{size(n)} at {context}" for context, n in told["bytes_at"].items()]
    return f"{told['type']}: {size(told['bytes_per_token'])} a token, {', '.join(at)}"
