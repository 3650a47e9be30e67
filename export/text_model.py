"""The text model in a multimodal checkpoint, as a checkpoint of its own.

A runtime for text needs the text model alone, and knows it by its own architecture. transformers says which class that is,
which parameters belong to it, and under which names the files have them. No tensor is copied.
"""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from llmc.formats import quantized
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.decoded import Coded, Decoded
from llmc.formats.hf import empty_model, load_config
from llmc.formats.linears import find_layers
from llmc.formats.names import Names


@dataclass
class TextModel(Checkpoint):
    """The text model of a checkpoint. `folder` is that of the whole model; `config` is config.json of the text model alone.

    read: transformers' reading of that config."""

    read: Any = None


def config_of(ckpt: Checkpoint) -> Any:
    """transformers' config of a checkpoint, or of a text model in one."""
    return ckpt.read if isinstance(ckpt, TextModel) else load_config(ckpt.folder)


def text_model(ckpt: Checkpoint) -> TextModel | None:
    """The text model in a multimodal checkpoint. None if it has no other part, or transformers has no class for it alone."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    whole = load_config(ckpt.folder)
    text = deepcopy(whole.get_text_config())
    architecture = CLASSES.get(text.model_type)
    if whole.get_text_config() is whole or architecture is None:
        return None
    model, alone = empty_model(whole), empty_model(text)
    names = _names(ckpt, model, f"{alone.base_model_prefix}.")
    head = _name_of(alone, alone.get_output_embeddings())
    text.architectures, text.tie_word_embeddings = [architecture], f"{head}.weight" not in names.values()
    said = next((v for v in ckpt.config.values() if isinstance(v, dict) and v.get("model_type") == text.model_type), {})
    config = {**text.to_dict(), **said, "architectures": [architecture], "tie_word_embeddings": text.tie_word_embeddings}
    headers = {file: {names[n]: entry for n, entry in header.items() if n in names} for file, header in ckpt.headers.items()}
    return TextModel(
        ckpt.folder, config, {names[n]: file for n, file in ckpt.shard_of.items() if n in names}, headers, ckpt.quantization,
        _renamed(ckpt.decoded, names), text)


def _names(ckpt: Checkpoint, model: Any, base: str) -> dict[str, str]:
    """{stored name: name in the files of the text model alone}, for its tensors and codes. base: the prefix of its layers."""
    linears = quantized.linears(ckpt)
    known = Names.of(ckpt, model, linears)
    part = find_layers(model)[0].rpartition(".")[0] + "."
    head = _name_of(model, model.get_output_embeddings())
    # what the files hold of a tensor or a part of a quantized linear
    stored: dict[str, tuple[str, ...]] = {name: (name,) for name in ckpt.names()}
    stored |= {name: coded.parts for name, coded in ckpt.decoded.tensors.items()}
    codes = {p: linear for linear in linears for p in quantized.parts(linear)}
    prefixes: Counter[str] = Counter()
    owners = {name: known.find_own(codes.get(name, name)) for name in stored}
    for name, owner in owners.items():
        plain = codes.get(name, name)
        if owner and owner.startswith(part) and plain.endswith(rest := owner.removeprefix(part)):
            prefixes[plain.removesuffix(rest)] += 1
    above = max(prefixes, key=prefixes.__getitem__, default="")
    found: dict[str, str] = {}
    for name, owner in owners.items():
        if owner is None:
            continue
        if owner.startswith(part) and name.startswith(above):
            new = base + name.removeprefix(above)
        elif owner == head or owner.startswith(f"{head}."):
            new = f"lm_head.{name.rpartition('.')[2]}"
        else:
            continue
        found[name] = new
        found |= {p: new + p.removeprefix(name) if p.startswith(name) else new.rpartition(".")[0] + "." + p.rpartition(".")[2]
                  for p in stored[name] if p != name}
    return found


def _name_of(model: Any, module: Any) -> str:
    return next(name for name, m in model.named_modules() if m is module)


def _renamed(decoded: Decoded, names: dict[str, str]) -> Decoded:
    def coded(c: Coded) -> Coded:
        return replace(c, parts=tuple(names[p] for p in c.parts))

    return replace(decoded, tensors={names[n]: coded(c) for n, c in decoded.tensors.items() if n in names},
                   unused=frozenset(names[n] for n in decoded.unused if n in names))
