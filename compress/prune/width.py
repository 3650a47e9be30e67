"""Narrower layers: remove neurons, heads and channels with the smallest activations, and make a plain model of the others.

Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation" (Minitron), 2024 (arXiv:2407.14679),
section 2.2. One pass over calibration text measures the importance:

* of a feed-forward neuron: the mean |x_j| at the input of the down projection;
* of an attention head: the mean L2 norm of its output, at the input of the output projection. Query heads that share a key
  and value head form a group. The importance of a group is the sum over its heads, and only whole groups are removed;
* of a channel of the residual stream: the mean |x_j| of the norms' outputs, over all layers.

Every layer keeps the same number of neurons and groups, but each layer chooses its own. The channels are the same in all
layers.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from llmc.compress.passes import LayerWatch
from llmc.compress.prune.config import PruneConfig
from llmc.compress.skeleton import LinearGroup, Skeleton
from llmc.errors import UserError
from llmc.families import FAMILIES, by_model_type, nearest
from llmc.families.names import classify
from llmc.families.row import Family

WIDE, NARROW = 256, 32  # block sizes of GGUF types: K-quants, all others


@dataclass(frozen=True)
class Shape:
    """The sizes of a model. ffn: neurons of a layer.  groups: key and value heads.  per_group: query heads of each group.
    head: width of a head.  hidden: channels of the residual stream."""

    ffn: int
    groups: int
    per_group: int
    head: int
    hidden: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        c = config.get_text_config()
        heads = c.num_attention_heads
        family = by_model_type(c.model_type)
        groups = family.key_heads(c) if family else heads
        return cls(c.intermediate_size, groups, heads // groups, getattr(c, "head_dim", None) or c.hidden_size // heads,
                   c.hidden_size)


def family_of(config: Any) -> Family:
    """The family of a transformers config. UserError if it is unknown or cannot be made narrower."""
    kind = config.get_text_config().model_type
    family = by_model_type(kind)
    if family is None or family.unnarrowable:
        known = [name for name, f in FAMILIES.items() if not f.unnarrowable]
        raise UserError(f"--method width does not know the architecture {kind!r}"
                        + (f": {family.unnarrowable}" if family else nearest(kind, known)),
                        "the other methods work for every architecture; `llmc models` shows what each can do")
    return family


def narrowed(config: Any, c: PruneConfig) -> tuple[Shape, list[str]]:
    """Returns (the shape after pruning, a note on every number that pruning changes). UserError if no shape fits the
    options."""
    family_of(config)
    old = Shape.of(config)
    groups = old.groups * c.heads
    if abs(groups - round(groups)) > 0.02 or round(groups) < 1:
        possible = ", ".join(f"{n / old.groups:.4g}" for n in range(1, old.groups + 1))
        raise UserError(f"--heads {c.heads:g}: {old.groups * old.per_group} query heads share {old.groups} key and value "
                        f"heads, and {groups:.4g} of these is no whole number", f"use one of {possible}")
    new_groups = round(groups)
    ffn, ffn_step = _rounded(old.ffn, c.ffn, "ffn", WIDE)
    hidden, hidden_step = _rounded(old.hidden, c.hidden, "hidden", WIDE if old.hidden % WIDE == 0 else NARROW)
    if hidden % (new_groups * old.per_group) and not _loads(config, hidden, new_groups * old.per_group):
        fitting = [n for n in range(1, old.groups + 1) if hidden % (n * old.per_group) == 0]
        raise UserError(f"{hidden} channels are no multiple of {new_groups * old.per_group} query heads, and transformers "
                        f"does not load such a {config.get_text_config().model_type} model",
                        f"use --heads {' or '.join(f'{n / old.groups:.4g}' for n in fitting)}" if fitting else
                        "keep another share with --hidden")
    notes = [f"{name}: {new} of {was}, the multiple of {step} nearest to the share {share:g}"
             for name, new, was, step, share in (("ffn", ffn, old.ffn, ffn_step, c.ffn),
                                                 ("hidden", hidden, old.hidden, hidden_step, c.hidden)) if share != 1]
    if c.heads != 1:
        notes.append(f"heads: {new_groups * old.per_group} of {old.groups * old.per_group}, in {new_groups} of "
                     f"{old.groups} groups")
    return Shape(ffn, new_groups, old.per_group, old.head, hidden), notes


def _loads(config: Any, hidden: int, heads: int) -> bool:
    """Whether a model of this shape passes the check of transformers 5, which some families' configs have."""
    changed = copy.deepcopy(config.get_text_config())
    changed.hidden_size, changed.num_attention_heads = hidden, heads
    try:
        getattr(changed, "validate_architecture", lambda: None)()
    except ValueError:
        return False
    return True


def _rounded(width: int, share: float, name: str, first: int) -> tuple[int, int]:
    """Returns (the new width, the step that it is a multiple of).

    The new width is the multiple of `first` nearest to share * width. If that is not below `width`, or differs by more than
    an eighth from share * width, it is the nearest multiple of NARROW. UserError if none fits."""
    if share == 1:
        return width, 1
    for step in sorted({first, NARROW}, reverse=True):
        found = int(width * share / step + 0.5) * step
        if 0 < found < width and (step == NARROW or abs(found - width * share) <= width * share / 8):
            return found, step
    raise UserError(f"--{name} {share:g}: no multiple of {NARROW} is near {width * share:.0f} and below {width}",
                    f"use --{name} {NARROW / width:.3g} to {(width - 1) // NARROW * NARROW / width:.3g}")


class ImportanceWatch(LayerWatch):
    """Measures the importance in each layer. A layer's tensors, float32: 'ffn' [neurons], 'groups' [key and value heads] and
    'hidden' [channels], sums over tokens ('hidden' also over the norms that linears read)."""

    def __init__(self, config: Any) -> None:
        self.shape, self.family = Shape.of(config), family_of(config)

    def begin(self, index: int, layer: nn.Module, groups: list[LinearGroup]) -> None:
        s = self.shape
        self.sums = {"ffn": torch.zeros(s.ffn, dtype=torch.float64), "groups": torch.zeros(s.groups, dtype=torch.float64),
                     "hidden": torch.zeros(s.hidden, dtype=torch.float64)}

    def see(self, group: LinearGroup, inputs: torch.Tensor) -> None:
        rows = inputs.reshape(-1, group.in_features).float()
        if group.names[0] == self.family.down:
            self._add("ffn", rows.abs())
        elif group.names[0] == self.family.out:
            by_head = torch.linalg.vector_norm(rows.view(len(rows), self.shape.groups, -1, self.shape.head), dim=-1)
            self._add("groups", by_head.sum(-1))
        else:
            self._add("hidden", rows.abs())

    def finish(self, index: int, layer: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        return {name: sums.float() for name, sums in self.sums.items()}, {"layer": index}

    def _add(self, name: str, sizes: torch.Tensor) -> None:
        self.sums[name] += sizes.sum(0).double().cpu()


def highest(importance: torch.Tensor, count: int) -> torch.Tensor:
    """int64 [count]: the indices of the largest values, ascending. Of equal values it takes the first."""
    return importance.argsort(descending=True, stable=True)[:count].sort().values


@dataclass
class Slices:
    """The rows and columns of every tensor that stay. ffn, groups: int64 indices for each layer.  hidden: int64 indices."""

    old: Shape
    new: Shape
    family: Family
    ffn: list[torch.Tensor]
    groups: list[torch.Tensor]
    hidden: torch.Tensor
    scale: float = field(init=False)

    def __post_init__(self) -> None:
        self.scale = (self.old.hidden / self.new.hidden) ** 0.5 if self.family.scaled_embedding else 1.0

    def cut(self, name: str, tensor: torch.Tensor, layer: int | None, tied: bool) -> torch.Tensor:
        """Returns a tensor of the checkpoint in its new shape. layer: None outside the decoder layers.  tied: the head is the
        embedding."""
        owner, _, part = name.rpartition(".")
        if layer is None:
            cut = tensor.index_select(-1, self.hidden)
            return self._rescaled(name, cut, tied) if self.scale != 1 else cut
        rows, columns = self._of(owner, layer, tensor, name)
        cut = tensor if rows is None else tensor.index_select(0, rows)
        return cut if columns is None or part == "bias" else cut.index_select(1, columns)

    def _of(self, owner: str, layer: int, tensor: torch.Tensor, name: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The (rows, columns) of a decoder layer's tensor that stay; None means all. For a bias the rows count. UserError if
        the part of the tensor is unknown."""
        s, f, ffn = self.old, self.family, self.ffn[layer]
        kv = self._spread(self.groups[layer], s.head)
        query = self._spread(self.groups[layer], s.per_group * s.head)
        first_k, first_v = s.groups * s.per_group * s.head, s.groups * (s.per_group + 1) * s.head
        gate_up = ffn if "ffn_gate" in f.linears else torch.cat([ffn, s.ffn + ffn])
        of_role = {
            "attn_q": (query, self.hidden), "attn_k": (kv, self.hidden), "attn_v": (kv, self.hidden),
            "attn_qkv": (torch.cat([query, first_k + kv, first_v + kv]), self.hidden), "attn_output": (self.hidden, query),
            "ffn_gate": (ffn, self.hidden), "ffn_up": (gate_up, self.hidden), "ffn_down": (self.hidden, ffn),
        }
        if role := f.role_of(owner):
            return of_role[role]
        for norm, heads in zip(f.head_norms, (query, kv), strict=False):
            if owner.endswith(f".{norm}"):  # of one head, or in OLMo of all of them
                return (None if tensor.shape[0] == s.head else heads), None
        if owner.endswith(tuple(f".{norm}" for norm in f.all_norms)):
            return self.hidden, None
        raise UserError(f"--method width does not know the role of {name}",
                        "use --method depth, or a method that makes weights zero")

    def _rescaled(self, name: str, cut: torch.Tensor, tied: bool) -> torch.Tensor:
        """Keep the scale of the embedding. Gemma multiplies its embedding by the square root of the number of channels, and
        that number falls, so the embedding is scaled up. If the embedding is also the head, the last norm is scaled down."""
        if classify(name) == "embedding":
            return (cut.float() * self.scale).to(cut.dtype)
        if tied and f".{name}".endswith(f".{self.family.final_norm}.weight"):
            offset = self.family.offset
            return ((offset + cut.float()) / self.scale - offset).to(cut.dtype)
        return cut

    @staticmethod
    def _spread(groups: torch.Tensor, width: int) -> torch.Tensor:
        """The rows of whole groups, `width` rows each."""
        return (groups[:, None] * width + torch.arange(width)).flatten()


def slices(skeleton: Skeleton, new: Shape, sums: list[dict[str, torch.Tensor]]) -> Slices:
    """The rows and columns that stay, by the importance that `ImportanceWatch` summed in each layer."""
    hidden = torch.stack([s["hidden"] for s in sums]).double().sum(0)
    return Slices(Shape.of(skeleton.config), new, family_of(skeleton.config), [highest(s["ffn"], new.ffn) for s in sums],
                  [highest(s["groups"], new.groups) for s in sums], highest(hidden, new.hidden))


def narrow_config(raw: dict[str, Any], new: Shape) -> dict[str, Any]:
    """config.json of the new shape. It states head_dim, which can no longer be computed from the other sizes."""
    values = {"intermediate_size": new.ffn, "num_attention_heads": new.groups * new.per_group,
              "num_key_value_heads": new.groups, "head_dim": new.head, "hidden_size": new.hidden}
    return {**raw, "text_config": {**raw["text_config"], **values}} if "text_config" in raw else {**raw, **values}
