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
from llmc.families.names import role_of
from llmc.families.row import Family, activation_of
from llmc.formats.linears import get_weight
from llmc.formats.mixture import Experts


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
        ends = dict.fromkeys(r.rpartition(".")[2] for r in self.readers)  # those of experts are alike
        return f"{self.writer} -> {', '.join(ends)}"


@dataclass(frozen=True)
class Heads:
    """query: number of query heads.  kv: number of key and value heads; query/kv consecutive query heads share one.  width:
    of each head."""

    query: int
    kv: int
    width: int


@dataclass(frozen=True)
class LayerMap:
    """norms, value, ups: the places of a layer; of a mixture each expert has one of `ups`. A place that cannot be transformed
    is missing, and `left` has the reason.  writers: the linears whose output is added to the residual stream."""

    family: Family
    heads: Heads
    norms: tuple[Place, ...]
    value: Place
    ups: tuple[Place, ...]
    writers: tuple[str, ...]
    left: tuple[str, ...]

    @property
    def up(self) -> Place | None:
        """The place of a dense MLP; None if it cannot be transformed."""
        return next(iter(self.ups), None)

    @property
    def places(self) -> tuple[Place, ...]:
        return (*self.norms, self.value, *self.ups)


def family_of(config: Any) -> Family:
    """The family of a transformers config. UserError if it is unknown."""
    kind = config.get_text_config().model_type
    family = by_model_type(kind)
    if family is None or family.unmapped:
        near = "" if family else nearest(kind, [name for name, f in FAMILIES.items() if not f.unmapped])
        raise UserError(f"llmc does not know which channels of the architecture {kind!r} can be transformed"
                        + (f": {family.unmapped}" if family else near),
                        "quantize without a transform; `llmc models` shows what each architecture can do")
    return family


def map_layer(config: Any, layer: nn.Module) -> LayerMap:
    """The places of a decoder layer. Its weights are not read, so it may be on the meta device."""
    family, c = family_of(config), config.get_text_config()
    shape = {n: tuple(get_weight(layer.get_submodule(n)).shape) for n in (family.value, family.out)}
    mlp = _mixture(family, layer) if family.experts else _dense(family, c, layer)
    query = c.num_attention_heads
    heads = Heads(query, family.key_heads(c), shape[family.out][1] // query)
    left, norms = list(mlp.left), []
    for name, linears in family.norms_of(dict(layer.named_modules())).items():
        readers = (*linears, *mlp.readers) if name == family.mlp_norm else linears
        width = get_weight(layer.get_submodule(readers[0])).shape[1]
        place = Place(name, readers, width, torch.arange(width))
        if reason := _norm_is_fixed(c, layer.get_submodule(name)):
            left.append(f"{place.name}: {reason}")
        else:
            norms.append(place)
    channels = heads.kv * heads.width
    head = torch.arange(query)[:, None] // (query // heads.kv)
    value = Place(family.value, (family.out,), channels, (head * heads.width + torch.arange(heads.width)).flatten(),
                  _last_of_each_group(heads) if family.qkv_by_head else _last(shape[family.value][0], channels))
    return LayerMap(family, heads, tuple(norms), value, mlp.ups, (family.out, *mlp.writers), tuple(left))


@dataclass(frozen=True)
class _Mlp:
    """What comes after mlp_norm. readers: its linears that read the norm and that the family's row does not name.  writers:
    those that make its output.  ups, left: as in LayerMap."""

    readers: tuple[str, ...]
    writers: tuple[str, ...]
    ups: tuple[Place, ...]
    left: tuple[str, ...] = ()


def _dense(family: Family, config: Any, layer: nn.Module) -> _Mlp:
    up = _up(layer, family.up, family.down)
    between = None if family.gated else activation_of(config)  # in a gated MLP only the gate passes the activation
    if between not in (None, "relu"):  # relu(s x) = s relu(x) for s > 0
        why = f"{up.name}: {between} lies between and does not commute with a scaling"
        return _Mlp((), (family.down,), (), (why,))
    return _Mlp((), (family.down,), (up,))


def _mixture(family: Family, layer: nn.Module) -> _Mlp:
    """Experts, their router, and what runs beside them, by the modules that are there; or a gated MLP in their place."""
    block, inside = layer.get_submodule(family.experts), set[str]()
    readers, writers, ups, left = list[str](), list[str](), list[Place](), list[str]()
    for path, module in block.named_modules():
        name = ".".join(part for part in (family.experts, path) if part)
        if isinstance(module, Experts):
            inside.update(f"{name}.{n}" for n, _ in module.named_modules())
            scales = module.scales()
            for number in range(module.count):
                into, out = [f"{name}.{n}" for n in module.into(number)], f"{name}.{module.out(number)}"
                readers += into
                writers.append(out)
                if scales:
                    ups.append(_up(layer, into[-1], out))
            if not scales:
                left.append(f"{name}: what lies between the matrices of an expert does not commute with a scaling")
        elif name in inside or not isinstance(module._parameters.get("weight"), torch.Tensor):
            continue
        elif role_of(name) == "ffn_down":
            writers.append(name)
            ups.append(_up(layer, f"{name.rpartition('.')[0]}.up_proj", name))
        else:  # gate and up, the router, and the gate of a shared expert
            readers.append(name)
    return _Mlp(tuple(readers), tuple(writers), tuple(ups), tuple(left))


def _up(layer: nn.Module, up: str, down: str) -> Place:
    """The channels between the two products of an MLP or of an expert."""
    rows, inner = (get_weight(layer.get_submodule(n)).shape[i] for i, n in enumerate((up, down)))
    return Place(up, (down,), inner, torch.arange(inner), _last(rows, inner))


def _last(rows: int, channels: int) -> torch.Tensor:
    """The rows of the channels at the end of a matrix. The rows before them may be q and k, or the gate."""
    return torch.arange(rows - channels, rows)


def _last_of_each_group(heads: Heads) -> torch.Tensor:
    """The rows of the values if the matrix holds the queries of a key head, its k, its v, and so on (GPT-NeoX, Falcon)."""
    group = heads.query // heads.kv + 2
    first = (torch.arange(heads.kv)[:, None] * group + group - 1) * heads.width
    return (first + torch.arange(heads.width)).flatten()


def _norm_is_fixed(config: Any, norm: nn.Module) -> str:
    """The reason why a norm's channels cannot be scaled; empty if they can."""
    if getattr(norm, "weight", None) is None:
        return "the norm has no weight to hold the scaling"
    if not getattr(config, "do_layer_norm_before", True):
        return "the norm comes after the sum, so its output is the residual stream itself"
    return ""
