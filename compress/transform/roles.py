"""The channels of a decoder layer that can be scaled or rotated without a change of the model's output.

The family's row gives the role of each module. From it and the config follow the places of a layer. If a pair of writer and
readers cannot be transformed in an architecture, it is reported with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from llmc.errors import UserError
from llmc.families import FAMILIES, by_model_type, nearest
from llmc.families.row import Family, activation_of
from llmc.formats.linears import get_weight


@dataclass(frozen=True)
class Place:
    """Channels that one writer makes and only its readers read. They can be scaled (and before o_proj rotated by head).

    writer: a norm (rows is None), or a linear whose row rows[c] makes channel c.
    readers: linears whose input column j reads channel columns[j].
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
    """query: number of query heads.  kv: number of key and value heads; query/kv consecutive query heads share one.  width:
    of each head."""

    query: int
    kv: int
    width: int


@dataclass(frozen=True)
class LayerMap:
    """norms, value, up: the places of a layer. A place that cannot be transformed is missing or None, and `left` has the
    reason."""

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
    """The family of a transformers config. UserError if it is unknown."""
    kind = config.get_text_config().model_type
    family = by_model_type(kind)
    if family is None:
        raise UserError(f"llmc does not know which channels of the architecture {kind!r} can be transformed",
                        f"it knows {', '.join(FAMILIES)}{nearest(kind, FAMILIES)}; quantize without a transform")
    return family


def map_layer(config: Any, layer: nn.Module) -> LayerMap:
    """The places of a decoder layer. Its weights are not read, so it may be on the meta device."""
    family, c = family_of(config), config.get_text_config()
    used = (family.value, family.out, family.up, family.down)
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
    value = Place(family.value, (family.out,), channels, (head * heads.width + torch.arange(heads.width)).flatten(),
                  _third_of_each_head(heads) if family.qkv_by_head else _last(shape[family.value][0], channels))
    inner = shape[family.down][1]
    up: Place | None = Place(family.up, (family.down,), inner, torch.arange(inner), _last(shape[family.up][0], inner))
    between = None if family.gated else activation_of(c)  # in a gated MLP only the gate passes the activation
    if up and between not in (None, "relu"):  # relu(s x) = s relu(x) for s > 0
        left.append(f"{up.name}: {between} lies between and does not commute with a scaling")
        up = None
    return LayerMap(family, heads, tuple(norms), value, up, tuple(left))


def _last(rows: int, channels: int) -> torch.Tensor:
    """The rows of the channels at the end of a matrix. The rows before them may be q and k, or the gate."""
    return torch.arange(rows - channels, rows)


def _third_of_each_head(heads: Heads) -> torch.Tensor:
    """The rows of the values if the matrix holds q, k, v of head 0, then those of head 1, and so on (GPT-NeoX)."""
    first = torch.arange(heads.kv)[:, None] * 3 * heads.width + 2 * heads.width
    return (first + torch.arange(heads.width)).flatten()


def _norm_is_fixed(config: Any, norm: nn.Module) -> str:
    """The reason why a norm's channels cannot be scaled; empty if they can."""
    if getattr(norm, "weight", None) is None:
        return "the norm has no weight to hold the scaling"
    if not getattr(config, "do_layer_norm_before", True):
        return "the norm comes after the sum, so its output is the residual stream itself"
    return ""
