"""Which channels of a decoder layer can be scaled or rotated without changing what the model computes.

One small table says what part each module plays; from it and the config follow the places of one layer. Where a pair does
not hold in an architecture, it is named with the reason, never passed over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from llmc.compress.skeleton import get_weight
from llmc.errors import UserError

RowsOf = Callable[[int, int, int], torch.Tensor]  # (rows of the weight, channels, head_dim) -> the channels' rows, in order


def _all(rows: int, channels: int, head_dim: int) -> torch.Tensor:
    return torch.arange(rows)


def _last(rows: int, channels: int, head_dim: int) -> torch.Tensor:
    """Stacked: q, k, v below one another, or gate and up."""
    return torch.arange(rows - channels, rows)


def _third_of_each_head(rows: int, channels: int, head_dim: int) -> torch.Tensor:
    """q, k, v of head 0, then of head 1, … (GPT-NeoX)."""
    first = torch.arange(channels // head_dim)[:, None] * 3 * head_dim + 2 * head_dim
    return (first + torch.arange(head_dim)).flatten()


@dataclass(frozen=True)
class Family:
    """The roles of the modules of one decoder layer, by their names in it.

    norms: each norm with the linears that are all that reads it.  value, up: a linear and which of its rows are meant;
    out, down: the linears that read these.  activation: of an MLP without gate, the config's name for what lies between up
    and down (of a gated one only the gate passes the activation, so scaling `up` is free).
    grouped: query heads may share a value head, num_key_value_heads of them.
    offset: what norms add to their weight before they multiply by it.  final_norm: its name in the base model.
    unrotatable: why the residual stream cannot be rotated, empty where it can.
    """

    norms: dict[str, tuple[str, ...]]
    value: tuple[str, RowsOf]
    out: str
    up: tuple[str, RowsOf]
    down: str
    activation: str = ""
    grouped: bool = True
    offset: float = 0.0
    final_norm: str = "norm"
    unrotatable: str = ""


_MEAN = "its LayerNorm subtracts the mean, which a rotation does not keep"
LLAMA = Family(
    norms={"input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
           "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj")},
    value=("self_attn.v_proj", _all), out="self_attn.o_proj", up=("mlp.up_proj", _all), down="mlp.down_proj")
GEMMA = replace(
    LLAMA, offset=1.0,
    norms={"input_layernorm": LLAMA.norms["input_layernorm"], "pre_feedforward_layernorm": ("mlp.gate_proj", "mlp.up_proj")},
    unrotatable="its norms after attention and MLP scale channels of what is added to the stream")
FAMILIES: dict[str, Family] = {
    "llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA, "qwen3": LLAMA, "gemma2": GEMMA, "gemma3_text": GEMMA,
    "phi3": replace(LLAMA, norms={"input_layernorm": ("self_attn.qkv_proj",),
                                  "post_attention_layernorm": ("mlp.gate_up_proj",)},
                    value=("self_attn.qkv_proj", _last), up=("mlp.gate_up_proj", _last)),
    "gpt2": Family(norms={"ln_1": ("attn.c_attn",), "ln_2": ("mlp.c_fc",)}, value=("attn.c_attn", _last), out="attn.c_proj",
                   up=("mlp.c_fc", _all), down="mlp.c_proj", activation="activation_function", grouped=False,
                   unrotatable=_MEAN),
    "opt": Family(norms={"self_attn_layer_norm": LLAMA.norms["input_layernorm"], "final_layer_norm": ("fc1",)},
                  value=("self_attn.v_proj", _all), out="self_attn.out_proj", up=("fc1", _all), down="fc2",
                  activation="activation_function", grouped=False, unrotatable=_MEAN),
    "gpt_neox": Family(norms={"input_layernorm": ("attention.query_key_value",),
                              "post_attention_layernorm": ("mlp.dense_h_to_4h",)},
                       value=("attention.query_key_value", _third_of_each_head), out="attention.dense",
                       up=("mlp.dense_h_to_4h", _all), down="mlp.dense_4h_to_h", activation="hidden_act", grouped=False,
                       unrotatable=_MEAN),
}


@dataclass(frozen=True)
class Place:
    """Channels that a writer makes and that its readers alone see: free to be scaled (and, at o_proj, rotated by head).

    writer: a norm (rows None) or a linear, of which channel c is row rows[c].
    readers: linears, of which input column j sees channel columns[j].
    """

    writer: str
    readers: tuple[str, ...]
    channels: int
    columns: torch.Tensor = field(repr=False)
    rows: torch.Tensor | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        return f"{self.writer} -> {', '.join(r.rpartition('.')[2] for r in self.readers)}"


@dataclass(frozen=True)
class Heads:
    """query: query heads.  kv: key and value heads; query heads h … h + query/kv - 1 share one.  width: of each head."""

    query: int
    kv: int
    width: int


@dataclass(frozen=True)
class LayerMap:
    """norms, value, up: the places of a layer, None where a pair does not hold; then `left` says why."""

    family: Family
    heads: Heads
    norms: tuple[Place, ...]
    value: Place
    up: Place | None
    left: tuple[str, ...]

    @property
    def places(self) -> tuple[Place, ...]:
        return (*self.norms, self.value, *([self.up] if self.up else []))


def family_of(config: Any) -> Family:
    """The row of the table for a transformers config."""
    kind = config.get_text_config().model_type
    if kind not in FAMILIES:
        raise UserError(f"llmc does not know which channels of the architecture {kind!r} can be transformed",
                        f"it knows {', '.join(FAMILIES)}; quantize without a transform")
    return FAMILIES[kind]


def map_layer(config: Any, layer: nn.Module) -> LayerMap:
    """The places of a decoder layer (on any device, meta too)."""
    family, c = family_of(config), config.get_text_config()
    used = (family.value[0], family.out, family.up[0], family.down)
    shape = {n: tuple(get_weight(layer.get_submodule(n)).shape) for n in used}
    query = c.num_attention_heads
    kv = getattr(c, "num_key_value_heads", None) if family.grouped else None
    heads = Heads(query, kv or query, shape[family.out][1] // query)
    left, norms = [], []
    for name, readers in family.norms.items():
        width = get_weight(layer.get_submodule(readers[0])).shape[1]
        place = Place(name, readers, width, torch.arange(width))
        if reason := _norm_is_fixed(c, layer.get_submodule(name)):
            left.append(f"{place.name}: {reason}")
        else:
            norms.append(place)
    channels = heads.kv * heads.width
    head = torch.arange(query)[:, None] // (query // heads.kv)
    value = Place(family.value[0], (family.out,), channels, (head * heads.width + torch.arange(heads.width)).flatten(),
                  family.value[1](shape[family.value[0]][0], channels, heads.width))
    inner = shape[family.down][1]
    up: Place | None = Place(family.up[0], (family.down,), inner, torch.arange(inner),
                             family.up[1](shape[family.up[0]][0], inner, heads.width))
    between = getattr(c, family.activation) if family.activation else None
    if up and between not in (None, "relu"):  # relu(s x) = s relu(x) for s > 0
        left.append(f"{up.name}: {between} lies between, which does not commute with a scaling")
        up = None
    return LayerMap(family, heads, tuple(norms), value, up, tuple(left))


def _norm_is_fixed(config: Any, norm: nn.Module) -> str:
    """Why a norm's channels cannot be scaled, empty where they can."""
    if getattr(norm, "weight", None) is None:
        return "the norm has no weight to hold the scaling"
    if not getattr(config, "do_layer_norm_before", True):
        return "the norm comes after the sum, so its output is the stream itself"
    return ""
