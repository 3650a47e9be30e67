"""What llama.cpp must be told of a model: names of its tensors, metadata, and the order of rows.

What differs from family to family is in the rows of llmc.families; names of tensors come from the gguf package's own table.
Where a model asks for something that llama.cpp's code for the architecture does not do, that is an error here, or a note on
the report where only long texts differ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from llmc.errors import UserError
from llmc.export.gguf.rope import add_rope
from llmc.families import FAMILIES, by_architecture, nearest
from llmc.families.row import Family, activation_of

if TYPE_CHECKING:
    from gguf import GGUFWriter

CONVERTER = "use --converter PATH_TO_A_LLAMA.CPP_CHECKOUT: its own converter knows many more"


class TensorNames:
    """llama.cpp's names of a checkpoint's tensors, by the gguf package's table."""

    def __init__(self, family: Family, layers: int) -> None:
        from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

        self.table = get_tensor_name_map(next(k for k in MODEL_ARCH if MODEL_ARCH_NAMES[k] == family.gguf.name), layers)

    def find(self, name: str) -> str | None:
        """None where llama.cpp has no place for it. GPT-2's own checkpoints leave out the prefix that transformers gives
        its tensors."""
        found = (self.table.get_name(n, try_suffixes=(".weight", ".bias")) for n in (name, f"transformer.{name}"))
        return next(filter(None, found), None)


def find_architecture(config: dict[str, Any], hint: str = CONVERTER) -> Family:
    """The row for a config.json, by its `architectures`, of a family that llmc writes into GGUF. hint: what else the user can
    do where there is none."""
    names = config.get("architectures") or []
    for name in names:
        family = by_architecture(name)
        if family and family.gguf.name:
            return family
    what = ", ".join(names) or config.get("model_type") or "unnamed"
    known = [f.architecture for f in FAMILIES.values() if f.gguf.name]
    raise UserError(f"llmc does not write the architecture {what} into GGUF; it writes {', '.join(known)}"
                    + nearest(what, known), hint)


def add_hyperparameters(writer: GGUFWriter, family: Family, c: Any) -> tuple[dict[str, np.ndarray], list[str]]:
    """Write what llama.cpp must know of the model.

    c: the transformers config, complete with defaults.  Returns the rope tensors and notes for the report.
    """
    heads = c.num_attention_heads
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // heads
    _check_assumptions(family, c, head_dim)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    inner = getattr(c, "intermediate_size", None) or getattr(c, "n_inner", None) or 4 * c.hidden_size
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv((getattr(c, "num_key_value_heads", None) if family.grouped else None) or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if hasattr(c, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(c.layer_norm_epsilon)
    tensors = add_rope(writer, c.to_dict(), head_dim, c.max_position_embeddings) if family.rotary else {}
    notes = _add_window(writer, family, c)
    for name in family.gguf.softcaps:
        if value := getattr(c, name):
            getattr(writer, f"add_{name}")(value)
    return tensors, notes


def _check_assumptions(family: Family, c: Any, head_dim: int) -> None:
    """What llama.cpp's code for the architecture has built in must be what config.json says."""
    g = family.gguf
    if (activation := activation_of(c)) not in g.activations:
        raise _unlike("the activation", activation, g.activations[0])
    for name, value in g.assumed.items():
        if bool(found := getattr(c, name, value)) != bool(value):  # None, 0 and false all mean: not there
            raise _unlike(name, found, value)
    for name, needed in g.softcaps.items():
        if needed and not getattr(c, name):
            raise _unlike(name, getattr(c, name), "a positive number")
    wide = c.num_hidden_layers == g.wide_scale_layers
    scale = c.hidden_size // c.num_attention_heads if wide else head_dim
    if (found := getattr(c, "query_pre_attn_scalar", scale)) != scale:
        raise _unlike("query_pre_attn_scalar", found, scale)


def _unlike(name: str, value: Any, allowed: Any) -> UserError:
    return UserError(f"config.json has {name} = {value!r}, and llama.cpp computes {allowed!r} for this architecture",
                     "such a model cannot be run by llama.cpp as it is")


def _add_window(writer: GGUFWriter, family: Family, c: Any) -> list[str]:
    """The sliding window, where the architecture has one; else a note if the model does."""
    if family.gguf.window == "layers":
        sliding = [kind == "sliding_attention" for kind in c.layer_types]
        if any(sliding):
            writer.add_sliding_window(c.sliding_window)
            writer.add_array(f"{writer.arch}.attention.sliding_window_pattern", sliding)
        return []
    window = getattr(c, "sliding_window", None)
    if family.gguf.window == "key":
        writer.add_sliding_window(window or 0)  # 0: there is none
    if not window or window >= c.max_position_embeddings or not getattr(c, "use_sliding_window", True):
        return []
    return [f"llama.cpp runs this architecture with full attention; the model's sliding window of {window} tokens "
            "is not applied, so texts longer than that are computed differently"]


def interleave(rows: int, heads: int) -> np.ndarray:
    """Order in which llama.cpp's llama wants the rows of Q or K: of each head 0, d/2, 1, d/2 + 1, …"""
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)
