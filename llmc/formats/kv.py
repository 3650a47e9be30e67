"""What the KV cache of an artifact takes: keys and values of every layer, for every token of the context."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmc.formats.onnx_folder import GENAI, is_onnx_folder

# bytes of one element; q8_0: 32 int8 codes and a float16 scale
BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "int8": 1.0, "uint8": 1.0}
CONTEXTS = (2048, 8192)


def shape(artifact: Path) -> dict[str, Any] | None:
    """{'layers' (that have a cache), 'kv_heads', 'head_dim', 'window', 'sliding_layers'} by the artifact's own words, None
    where they do not tell (latent attention among them). window: tokens that the sliding layers look back, None for none."""
    if artifact.is_file():
        return _of_gguf(artifact)
    folder: dict[str, Any] = {}
    if (artifact / "config.json").is_file():
        config = json.loads((artifact / "config.json").read_text(encoding="utf-8"))
        folder = config | config.get("text_config", {})
    if is_onnx_folder(artifact) and (artifact / GENAI).is_file():
        decoder = json.loads((artifact / GENAI).read_text(encoding="utf-8")).get("model", {}).get("decoder", {})
        named = {"num_hidden_layers": "num_hidden_layers", "num_key_value_heads": "num_key_value_heads",
                 "head_size": "head_dim", "num_attention_heads": "num_attention_heads", "hidden_size": "hidden_size"}
        folder |= {ours: decoder[theirs] for theirs, ours in named.items() if theirs in decoder}
    return _of_config(folder)


def _of_config(config: dict[str, Any]) -> dict[str, Any] | None:
    """Of a Hugging Face config; GPT-2's names are its own."""
    def first(*names: str) -> Any:
        return next((config[n] for n in names if config.get(n) is not None), None)

    layers, heads = first("num_hidden_layers", "n_layer"), first("num_attention_heads", "n_head")
    hidden = first("hidden_size", "n_embd")
    if not layers or not heads or "kv_lora_rank" in config:
        return None
    head_dim = first("head_dim") or (hidden // heads if hidden else None)
    kinds = config.get("layer_types") or ["full_attention"] * layers
    sliding = kinds.count("sliding_attention")
    return head_dim and {
        "layers": sum(kind.endswith("attention") and not kind.startswith("linear") for kind in kinds),
        "kv_heads": first("num_key_value_heads") or heads, "head_dim": head_dim,
        "window": config.get("sliding_window") if sliding else None, "sliding_layers": sliding,
    }


def _of_gguf(file: Path) -> dict[str, Any] | None:
    """Of a .gguf file's metadata. Which layers slide is for most architectures not written there, and llama.cpp's cache holds
    every token of those too unless it is told otherwise: they count as full."""
    from llmc.formats.gguf import field, open_gguf

    reader = open_gguf(file)
    name = field(reader, "general.architecture")

    def value(key: str) -> Any:
        return field(reader, f"{name}.{key}")

    layers, heads = value("block_count"), value("attention.head_count")
    kv_heads = value("attention.head_count_kv") or heads
    if not layers or not heads or value("attention.kv_lora_rank") is not None:
        return None
    per_layer = [int(n) for n in kv_heads] if isinstance(kv_heads, list) else [int(kv_heads)] * int(layers)
    most = max(per_layer)
    if any(n not in (0, most) for n in per_layer):
        return None
    head_dim = value("attention.key_length") or int(value("embedding_length")) // int(heads)
    return {"layers": sum(n > 0 for n in per_layer), "kv_heads": most, "head_dim": int(head_dim), "window": None,
            "sliding_layers": 0}


def describe(artifact: Path) -> dict[str, Any] | None:
    """`shape`, with 'bytes_per_token_f16' and 'bytes_at' (of CONTEXTS, in f16)."""
    known = shape(artifact)
    return known and {"bytes_per_token_f16": bytes_at(known, 1, "f16"), **known,
                      "bytes_at": {str(n): bytes_at(known, n, "f16") for n in CONTEXTS}}


def bytes_at(known: Mapping[str, Any], context: int, type: str) -> int:
    """Bytes of the cache of a `shape` with `context` tokens in it."""
    full = known["layers"] - known["sliding_layers"]
    tokens = full * context + known["sliding_layers"] * min(context, known["window"] or context)
    return round(2 * tokens * known["kv_heads"] * known["head_dim"] * BYTES[type])


def default(artifact: Path) -> str | None:
    """The type that an artifact's runtime takes when none is asked for; None where only the runtime knows."""
    return "f16" if artifact.suffix == ".gguf" else None


def section(known: Mapping[str, Any] | None, type: str) -> dict[str, Any]:
    """What a report says of the cache that ran: {'type', 'bytes_per_token', 'bytes_at'}."""
    if known is None or type not in BYTES:
        return {"type": type, "bytes_per_token": None, "bytes_at": None}
    return {"type": type, "bytes_per_token": bytes_at(known, 1, type),
            "bytes_at": {str(n): bytes_at(known, n, type) for n in CONTEXTS}}


def words(told: Mapping[str, Any]) -> str:
    """'f16: 46.1 kB a token, 94.4 MB at 2048, 377.5 MB at 8192' of a `section`."""
    from llmc.console import size

    if told["bytes_at"] is None:
        return f"{told['type']}: of unknown size"
    at = [f"{size(n)} at {context}" for context, n in told["bytes_at"].items()]
    return f"{told['type']}: {size(told['bytes_per_token'])} a token, {', '.join(at)}"
