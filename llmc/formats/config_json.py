"""What the keys of a model folder's config.json must be. transformers checks some of them, with errors of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmc.small_files import LARGE, OBJECT, TEXT, YES_NO, Kind, expect, read_json_object

HINT = "correct this value: the model's authors publish the right config.json"
LAYERS = Kind("a whole number from 1 to 4096", (int,), 1, 4096)
SIZE = Kind("a whole number from 1 to 100 million", (int,), 1, 100_000_000, listed=True)
TOKENS = Kind("a whole number from 1", (int,), 1)
EPSILON = Kind("a number from 0 to 1", (int, float), 0, 1)
NUMBER = Kind("a finite number", (int, float), -1e300, 1e300)
ID = Kind("a token id or a list of them", (int,), -1, 1 << 31, listed=True)
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")
SAMPLED = Kind("a number from 0 to 1 million", (int, float), 0, 1_000_000)
TOKENS_BY_NAME = ("bos_token", "eos_token", "unk_token", "pad_token")
TOKEN = Kind("a text, or an object with its content", (str, dict))

KINDS = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers"), LAYERS),
    **dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
                     "vocab_size", "n_embd", "n_head"), SIZE),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), TOKENS),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps"), EPSILON),
    **dict.fromkeys(("rope_theta", "initializer_range"), NUMBER),
    **dict.fromkeys(IDS, ID),
    **dict.fromkeys(("text_config", "quantization_config", "rope_scaling", "rope_parameters", "auto_map"), OBJECT),
    **dict.fromkeys(("architectures", "layer_types"), Kind("a list of texts", (str,), listed=True)),
    "model_type": TEXT, "tie_word_embeddings": YES_NO, "use_cache": YES_NO,
}


def read_checked(path: Path) -> dict[str, Any]:
    """The object in a config.json, its known keys checked, also those of the language model in `text_config`. A `text_config`
    that is null is left out."""
    config = read_json_object(path, hint="download the model again")
    expect(path, config, KINDS, HINT)
    if config.get("text_config", {}) is None:
        del config["text_config"]
    expect(path, config.get("text_config", {}), KINDS, HINT)
    return config


def read_generation(folder: Path) -> dict[str, Any]:
    """The object in a folder's generation_config.json, the keys that llmc reads checked; {} if there is none."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    found = read_json_object(path, hint="download the model again")
    expect(path, found, {**dict.fromkeys(IDS, ID), **dict.fromkeys(SAMPLING, SAMPLED)}, HINT)
    return found


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """The object in a folder's tokenizer_config.json, the keys that llmc reads checked; {} if there is none."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    found = read_json_object(path, LARGE, "download the model again")
    expect(path, found, {**dict.fromkeys(IDS, ID), **dict.fromkeys(TOKENS_BY_NAME, TOKEN)}, HINT)
    for name in TOKENS_BY_NAME:
        if isinstance(token := found.get(name), dict):
            expect(path, token, {"content": TEXT}, HINT)
    return found
