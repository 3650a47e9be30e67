"""Models whose weights lie on a type already: trained for it (QAT), or dequantized. What the plan, the types and the report
say of them. llmc.rounding.lattice finds the codes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch

from llmc.compress.quantize.assignment import Assignment, type_called
from llmc.compress.skeleton import Skeleton, linears_of
from llmc.formats.linears import get_weight
from llmc.formats.types import AnyType
from llmc.rounding import lattice

CARRIED = "carried"  # the method of a linear whose blocks all lie on its type
SOME = 16  # linears of a layer that are looked at first


def look(skeleton: Skeleton) -> dict[str, str]:
    """{linear: the type on which most of its blocks lie}, without linears that lie on none. A few blocks of each linear are
    tried. Some linears of the first, the middle and the last layer are read first: if none lies on a type, the others are not
    read, because training and dequantizing leave no layer out."""
    last = len(skeleton.layers) - 1
    first = {name for i in (0, last // 2, last) for name in _spread([n for at, n, _ in linears_of(skeleton) if at == i])}
    if all(lattice.type_of(w) is None for _, w in _weights(skeleton, first)):
        return {}
    found = {name: lattice.type_of(w) for name, w in _weights(skeleton, {name for _, name, _ in linears_of(skeleton)})}
    return {name: qtype.name for name, qtype in found.items() if qtype is not None}


def _spread(names: list[str]) -> list[str]:
    """A few of the names, evenly spaced: a mixture of experts has hundreds of linears in a layer."""
    return [names[i * len(names) // SOME] for i in range(SOME)] if len(names) > SOME else names


def _weights(skeleton: Skeleton, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, weight [out, in]) of these linears. One is in memory at a time."""
    for index in range(len(skeleton.layers)):
        wanted = {f"{skeleton.layer_name(index)}.{n}": m for n, m in skeleton.linears(index).items()}
        if wanted := {n: m for n, m in wanted.items() if n in names}:
            with skeleton.layer(index), torch.no_grad():
                for name, module in wanted.items():
                    with skeleton.filled([module]):
                        yield name, get_weight(module)


def keeping(a: Assignment, on: Mapping[str, str]) -> Assignment:
    """The types of `a`, with the types on which linears lie in place of the asked ones."""
    types = {linear: type_called(on[linear]) if linear in on else qtype for linear, qtype in a.types.items()}
    names = {qtype.name for qtype in types.values()}
    return Assignment(names.pop() if len(names) == 1 else CARRIED, types, {k: v for k, v in a.missed.items() if k not in on},
                      a.end_types)


def complete(skeleton: Skeleton, types: Mapping[str, AnyType]) -> bool:
    """Whether every block of every linear lies on the linear's type. Stops at the first that does not."""
    return all((found := lattice.find(w, types[name])) is not None and found.whole for name, w in _weights(skeleton, types))


def count(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """{type: {'linears', 'blocks', 'carried' (blocks)}} of the linears with carried blocks. records: of the layers."""
    found: dict[str, Counter[str]] = {}
    for record in records:
        for linear in record["linears"].values():
            if of := linear.get("carried"):
                found.setdefault(linear["type"], Counter()).update(linears=1, **of)
    return {qtype: dict(counts) for qtype, counts in sorted(found.items())}


def planned(a: Assignment, on: Mapping[str, str], stored: Iterable[str] = ()) -> tuple[str, ...]:
    """What the plan says of linears that lie on a type, by a sample of their blocks: a line for those that keep it, and one
    for those that are rounded to another. stored: the types of tensors that the folder stores as codes (FP8, MXFP4)."""
    kept = Counter(on[n] for n, qtype in a.types.items() if n in on and _called(qtype) == on[n])
    lost = Counter(on[n] for n, qtype in a.types.items() if n in on and _called(qtype) != on[n])

    def listed(counts: Counter[str]) -> str:
        return ", ".join(f"{n} on {name}" for name, n in counts.most_common())

    found = [f"{n} tensors are stored as {name}, and what is quantized of them is rounded again"
             for name, n in sorted(Counter(stored).items())]
    if kept:
        found.append(f"{kept.total()} of {len(a.types)} linears lie on their type already ({listed(kept)}): their codes are "
                     "carried over")
    if lost:
        found.append(f"{lost.total()} of {len(a.types)} linears lie on another type already ({listed(lost)}) and are rounded "
                     "again, which loses; without --bits, --type, --preset and targets they keep it")
    return tuple(found)


def _called(qtype: AnyType) -> str:
    """The block type with the same values."""
    return str(qtype.gguf_type or qtype.name).lower()
