"""Metadata of a GGUF file: its origin and the author's sampling values."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from gguf import GGUFWriter

from llmc.export.gguf.tokenizer import Vocabulary
from llmc.formats.config_json import read_generation
from llmc.sources.resolve import HUB_ID

HUB = "https://huggingface.co/"
PHI3 = re.compile("phi-?3", re.IGNORECASE)
PHI3_TOKENS = {"<unk>", "<s>", "</s>", "<|endoftext|>"}
SAMPLING = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
            "repetition_penalty": "penalty_repeat"}


def name_in_file(name: str, v: Vocabulary) -> str:
    """general.name: the model's name, changed where llama.cpp would change its tokenizer because of the name.

    If general.name contains `phi-3` or `phi3`, llama.cpp lets special tokens remove the spaces after them, and cannot load a
    vocabulary without PHI3_TOKENS (src/llama-vocab.cpp). So the name contains `phi-3` exactly if the tokenizer does that.
    """
    swallows = v.strips_right and set(v.tokens) >= PHI3_TOKENS
    if swallows and not PHI3.search(name):
        return f"{name} (phi-3)"
    return name if swallows else PHI3.sub("phi 3", name)


def add_provenance(writer: GGUFWriter, source: dict[str, Any], v: Vocabulary, parameters: int) -> None:
    """Write general.*: type, name, size, licence, base model, and llmc as the quantizer.

    The base model is the hub model that this file was made from. If that model has no hub name, it is the one on its card.
    """
    name = str(source["name"])
    writer.add_type("model")
    writer.add_name(name_in_file(name.rpartition("/")[2], v))
    writer.add_size_label(size_label(parameters))
    licence = source.get("licence") or "unknown"
    writer.add_license(licence if isinstance(licence, str) else ", ".join(map(str, licence)))
    writer.add_quantized_by("llmc")
    if HUB_ID.fullmatch(name):
        bases = [name]
    else:
        stated = source.get("base_model") or []
        bases = [stated] if isinstance(stated, str) else [str(b) for b in stated]
    if bases:
        writer.add_base_model_count(len(bases))
    for i, base in enumerate(bases):
        base = base.removeprefix(HUB)
        owner, _, short = base.rpartition("/")
        writer.add_base_model_name(i, short)
        if owner:
            writer.add_base_model_organization(i, owner)
            writer.add_base_model_repo_url(i, HUB + base)


def size_label(parameters: int) -> str:
    """The parameter count in llama.cpp's naming convention: '135M', '1.5B'."""
    for unit, divisor in (("B", 1e9), ("M", 1e6)):
        if parameters >= divisor:
            n = parameters / divisor
            digits = 0 if n >= 10 else 1
            return re.sub(r"\.0$", "", f"{n:.{digits}f}") + unit
    return f"{math.ceil(parameters / 1e3)}K"


def add_sampling(writer: GGUFWriter, folder: Path) -> None:
    """Write general.sampling.* from the sampling values in generation_config.json, if it has any."""
    values = read_generation(folder)
    for name, gguf_name in SAMPLING.items():
        value = values.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            key = f"general.sampling.{gguf_name}"
            if gguf_name == "top_k":
                writer.add_int32(key, int(value))
            else:
                writer.add_float32(key, float(value))
