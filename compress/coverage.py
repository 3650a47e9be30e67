"""Every parameter of the decoder layers before work begins: quantized, kept as a float by a rule with a name, or not
understood.

llmc changes the weights of linears. A model whose layers hold most weights elsewhere (experts that are one stacked parameter)
must not pass for a quantized one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from llmc.compress.skeleton import EXPERTS, Skeleton
from llmc.console import warn
from llmc.errors import UserError
from llmc.formats.layouts import listed
from llmc.formats.linears import get_weight, is_linear

MOST_UNKNOWN = 0.01  # of the layers' weights
NARROWEST = 32  # weights of the smallest block
MOST_UNFIT = 0.05  # of the layers' weights: linears that the type cannot hold. Above, the model is refused


@dataclass(frozen=True)
class Parameter:
    """name: in the model.  owner: the module that holds it."""

    name: str
    owner: nn.Module
    value: nn.Parameter

    @property
    def is_linear(self) -> bool:
        return is_linear(self.owner) and self.name.endswith(".weight")

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Rule:
    """Parameters that stay floats. why: in the plan, after their number."""

    why: str
    holds: Callable[[Parameter], bool]


# The first rule that holds counts. The rest is quantized if it is the weight of a linear, else it is not understood.
RULES = (
    Rule("biases", lambda p: bool(re.search(r"(^|[._])bias$", p.name))),
    Rule("norms and other vectors", lambda p: p.value.ndim < 2 or p.value.numel() == max(p.value.shape)),
    Rule("kernels of convolutions", lambda p: isinstance(p.owner, nn.Conv1d) or bool(re.search(r"\bconv1d?\b", p.name))),
    Rule("state matrices (A_log, D)", lambda p: bool(re.search(r"\.(A_log|D)$", p.name))),
    Rule("routers of experts", lambda p: bool(re.search(r"\.(router|gate|shared_expert_gate)(\.|$)", p.module + "."))),
    Rule("block-diagonal matrices", lambda p: p.value.ndim == 3 and p.value.shape[1] == p.value.shape[2]
         and not EXPERTS.search(p.name)),
    Rule(f"linears with fewer than {NARROWEST} inputs", lambda p: p.is_linear and _width(p) < NARROWEST),
)
KEPT = "kept by --keep"


@dataclass
class Coverage:
    """linears: names of the linears (modules) that a pass changes.  floats: {rule: parameters}.  unknown: not understood."""

    linears: list[str] = field(default_factory=list)
    floats: dict[str, list[Parameter]] = field(default_factory=dict)
    unknown: list[Parameter] = field(default_factory=list)
    weights: int = 0  # of all parameters

    @property
    def share(self) -> float:
        """Of the weights of the layers that are not understood."""
        return _count(self.unknown) / max(1, self.weights)

    def leave(self, why: str, linears: list[str], skeleton: Skeleton) -> None:
        """Keep these linears as floats too, if they are few. why: the rule."""
        if sum(get_weight(skeleton.model.get_submodule(n)).numel() for n in linears) > MOST_UNFIT * self.weights:
            return
        self.linears = [n for n in self.linears if n not in linears]
        for name in linears:
            owner = skeleton.model.get_submodule(name)
            self.floats.setdefault(why, []).append(Parameter(f"{name}.weight", owner, owner.weight))

    def left_linears(self) -> frozenset[str]:
        """The linears that stay floats."""
        return frozenset(p.module for found in self.floats.values() for p in found if p.is_linear)

    def float_matrices(self) -> Iterator[Parameter]:
        """The parameters of two axes or more that stay floats."""
        for found in (*self.floats.values(), self.unknown):
            yield from (p for p in found if p.value.ndim >= 2)

    def record(self) -> dict[str, Any]:
        """What stays float, for plan and manifest: {rule: {'tensors', 'weights', 'names' (layer numbers as *)}}."""
        rules = {**self.floats, **({"not understood": self.unknown} if self.unknown else {})}
        return {why: {"tensors": len(found), "weights": _count(found), "names": sorted({_starred(p.name) for p in found})}
                for why, found in rules.items()}


def cover(skeleton: Skeleton, keep: str | None = None) -> Coverage:
    """Sort the parameters of the decoder layers. keep: patterns with commas between them; a parameter stays a float if a part
    of its name fits one."""
    patterns = [p for p in (keep or "").split(",") if p]
    used: set[str] = set()
    found = Coverage()
    for p in _parameters(skeleton):
        found.weights += p.value.numel()
        rule = next((r.why for r in RULES if r.holds(p)), None)
        if fits := [x for x in patterns if fnmatchcase(p.name, f"*{x}*")]:
            used.update(fits)
            rule = rule or KEPT
        if rule:
            found.floats.setdefault(rule, []).append(p)
        elif p.is_linear:
            found.linears.append(p.module)
        else:
            found.unknown.append(p)
    if lost := sorted(set(patterns) - used):
        raise UserError(f"--keep {lost[0]}: no parameter of the decoder layers has a name with this part",
                        f"layer 0 has {listed([p.name for p in _parameters(skeleton, 1) if p.value.ndim >= 2], 20)}")
    return found


def checked(skeleton: Skeleton, what: str, keep: str | None = None, can_keep: bool = False) -> Coverage:
    """Like `cover`. Raises UserError if more than MOST_UNKNOWN of the weights are not understood, or if no linear is left.

    what: what the command does to linears, as in 'quantized'.  can_keep: whether the command has --keep.
    """
    found = cover(skeleton, keep)
    folder = skeleton.checkpoint.folder
    if found.unknown:
        names = list(dict.fromkeys(_starred(p.name) for p in found.unknown))
        share = f"{100 * found.share:.1f} % of the weights of the layers"
        if found.share > MOST_UNKNOWN:
            experts = any(EXPERTS.search(n) for n in names)
            kind = "a mixture of experts" if experts else "a model whose layers hold more than linears"
            hint = "give a dense model"
            if can_keep:
                keeping = ",".join(dict.fromkeys(n.rpartition("*.")[2] for n in names))
                hint += f", or leave these weights as they are with --keep '{keeping}'"
            raise UserError(f"{folder} is {kind}: {listed(names)} are no linears and would not be {what}, {share}", hint)
        warn(f"{folder}: {listed(names)} are no linears and stay as they are, {share}")
    if not found.linears:
        raise UserError(f"no linear of the decoder layers of {folder} would be {what}",
                        "give a --keep that fits fewer names" if keep else "llmc needs a decoder-only model")
    return found


def left_float(skeleton: Skeleton, what: str) -> dict[str, Any]:
    """What a pass over the quantized linears of a folder leaves as it is: {'tensors', 'weights', 'share' (of the weights of
    the layers), 'names' (layer numbers as *)}. What stays a float by a rule is not counted. Warns of more than MOST_UNKNOWN.

    what: what is not done to it, as in 'healed'.
    """
    count, left = 0, list[Parameter]()
    for p in _parameters(skeleton):
        count += p.value.numel()
        stored = skeleton.names.locate(p.name)
        if not any(r.holds(p) for r in RULES) and not (stored and stored.is_codes):
            left.append(p)
    names, share = sorted({_starred(p.name) for p in left}), _count(left) / max(1, count)
    if share > MOST_UNKNOWN:
        warn(f"{skeleton.checkpoint.folder}: {listed(names)} are not quantized and are not {what}, {100 * share:.1f} % of "
             "the weights of the layers")
    return {"tensors": len(left), "weights": _count(left), "share": share, "names": names}


def _parameters(skeleton: Skeleton, layers: int | None = None) -> Iterator[Parameter]:
    for index, layer in enumerate(skeleton.layers[:layers]):
        for path, owner in layer.named_modules():
            for name, value in owner.named_parameters(recurse=False):
                yield Parameter(".".join(part for part in (skeleton.layer_name(index), path, name) if part), owner, value)


def _width(p: Parameter) -> int:
    return int(get_weight(p.owner).shape[1])


def _count(found: list[Parameter]) -> int:
    return sum(p.value.numel() for p in found)


def _starred(name: str) -> str:
    """The name with * for the numbers of its layer and its expert."""
    return re.sub(r"\.\d+(?=\.)", ".*", name)
