"""What llama.cpp needs of a model: tensor names, metadata and the order of rows.

The differences between families are in the rows of llmc.families. Tensor names come from the table of the gguf package.
If a model needs something that llama.cpp's code for the architecture does not compute, this raises UserError. If only long
texts differ, the report gets a note.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from llmc.errors import UserError
from llmc.export.gguf.rope import add_rope
from llmc.export.windows import ignored
from llmc.families import FAMILIES, nearest, of_config
from llmc.families.row import Family, activation_of
from llmc.sources.llama_cpp import SETUP

if TYPE_CHECKING:
    from gguf import GGUFWriter

EPSILONS = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps")
STACKED = re.compile(r"(.*\.\d+\..*?)(?:\.norms)?\.(\d+)(\..*)")  # experts, and StableLM's norms: one of each in a layer
APPROXIMATED = {"gelu": "its approximation with tanh, which differs by at most 0.0005"}

CONVERTER = f"run `{SETUP}` once: llama.cpp's converter, which supports many more, comes from the package index"


class TensorNames:
    """llama.cpp's names of a checkpoint's tensors, from the table of the gguf package."""

    def __init__(self, family: Family, layers: int) -> None:
        from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

        self.table = get_tensor_name_map(next(k for k in MODEL_ARCH if MODEL_ARCH_NAMES[k] == family.gguf.name), layers)

    def find(self, name: str) -> str | None:
        """llama.cpp's name of a tensor, None if it has none. The original GPT-2 checkpoints lack transformers' prefix, so the
        name is also tried with it."""
        found = (self.table.get_name(n, try_suffixes=(".weight", ".bias")) for n in (name, f"transformer.{name}"))
        return next(filter(None, found), None)

    def place(self, name: str) -> tuple[str | None, int | None]:
        """(llama.cpp's name of a tensor, its number in a stack; None if it has none)."""
        if mapped := self.find(name):
            return mapped, None
        part = STACKED.fullmatch(name)
        return (self.find(part[1] + part[3]), int(part[2])) if part else (None, None)


def find_architecture(config: dict[str, Any], hint: str = CONVERTER) -> Family:
    """The family row for the `architectures` of a config.json.

    Raises UserError, with `hint`, if llmc does not write that family into GGUF."""
    family = of_config(config)
    if family and family.gguf.name:
        return family
    what = ", ".join(config.get("architectures") or []) or config.get("model_type") or "unnamed"
    known = [f.architecture for f in FAMILIES.values() if f.gguf.name]
    raise UserError(f"llmc does not write the architecture {what} as GGUF{nearest(what, known)}; `llmc models` lists those "
                    "that it writes", hint)


def add_hyperparameters(writer: GGUFWriter, family: Family, c: Any) -> tuple[dict[str, np.ndarray], list[str]]:
    """Write the model's hyperparameters as llama.cpp's metadata; return the rope tensors and notes for the report.

    c: the transformers config, complete with defaults.
    """
    heads = c.num_attention_heads
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // heads
    _check_assumptions(family, c, head_dim)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_head_count(heads)
    keys, kinds = family.key_heads(c), getattr(c, "layer_types", None) or []
    without = family.gguf.unattended
    writer.add_head_count_kv([0 if kind == without else keys for kind in kinds] if without else keys)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    add_epsilon = writer.add_layer_norm_eps if family.centred else writer.add_layer_norm_rms_eps
    add_epsilon(next(value for name in EPSILONS if (value := getattr(c, name, None)) is not None))
    tensors = add_rope(writer, c.to_dict(), head_dim, c.max_position_embeddings) if family.rotary else {}
    notes = _add_window(writer, family, c)
    for name, key in family.gguf.values.items():
        if (value := getattr(c, name, None)) is not None:
            getattr(writer, f"add_{key}")(value)
    if (activation := activation_of(c)) in APPROXIMATED:
        notes.append(f"the model's activation is {activation!r}, and llama.cpp computes {APPROXIMATED[activation]}")
    return tensors, notes


def _check_assumptions(family: Family, c: Any, head_dim: int) -> None:
    """Raise UserError if config.json contradicts what llama.cpp's code for the architecture assumes."""
    g = family.gguf
    if (activation := activation_of(c)) not in ("", *g.activations):
        raise _unlike("the activation", activation, g.activations[0])
    for name, value in g.assumed.items():
        if bool(found := getattr(c, name, value)) != bool(value):  # None, 0 and false all mean: absent
            raise _unlike(name, found, value)
    for name in g.required:
        if not getattr(c, name):
            raise _unlike(name, getattr(c, name), "a positive number")
    rotated = [(i + 1) % g.unrotated != 0 for i in range(c.num_hidden_layers)] if g.unrotated else []
    if g.unrotated and [bool(x) for x in c.no_rope_layers] != rotated:
        raise _unlike("no_rope_layers", c.no_rope_layers, [int(x) for x in rotated])
    wide = c.num_hidden_layers == g.wide_scale_layers
    scale = c.hidden_size // c.num_attention_heads if wide else head_dim
    if (found := getattr(c, "query_pre_attn_scalar", scale)) != scale:
        raise _unlike("query_pre_attn_scalar", found, scale)


def _unlike(name: str, value: Any, allowed: Any) -> UserError:
    return UserError(f"config.json has {name} = {value!r}, and llama.cpp computes {allowed!r} for this architecture",
                     "llama.cpp cannot run such a model as it is")


def _add_window(writer: GGUFWriter, family: Family, c: Any) -> list[str]:
    """Write the sliding window if the architecture has one; else return a note if the model has one."""
    window, depth = getattr(c, "sliding_window", None), family.gguf.window_depth
    if family.gguf.window == "layers":
        sliding = [layer_type == "sliding_attention" for layer_type in getattr(c, "layer_types", None) or []]
        if any(sliding) and depth and depth != c.num_hidden_layers:
            raise UserError(f"some layers of this model have a sliding window, and llama.cpp's {writer.arch} architecture "
                            f"has one only in models of {depth} layers, not of {c.num_hidden_layers}",
                            "llama.cpp cannot run this model as it is")
        if sliding and window:
            writer.add_sliding_window(window)
            writer.add_sliding_window_pattern(sliding)
        return []
    if family.gguf.window == "key":
        writer.add_sliding_window(window or 0)  # 0: none
    return ignored("llama.cpp", c, 0)


def interleave(rows: int, heads: int) -> np.ndarray:
    """The row order of Q and K in llama.cpp's `llama` architecture: within each head 0, d/2, 1, d/2 + 1, and so on."""
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)


def apart(rows: int, heads: int, keys: int) -> np.ndarray:
    """The row order of q, k and v in one matrix in llama.cpp: all of q, all of k, all of v. In the checkpoint, each of `keys`
    groups has its query heads, its k, its v."""
    groups = np.arange(rows).reshape(keys, heads // keys + 2, -1)
    return np.concatenate([groups[:, :-2].reshape(-1), groups[:, -2].reshape(-1), groups[:, -1].reshape(-1)])
