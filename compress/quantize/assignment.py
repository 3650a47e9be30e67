"""The quantization types of a model: of every linear, and of embedding and head in the exported file."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from llmc.compress.coverage import NARROWEST
from llmc.compress.quantize import presets
from llmc.compress.quantize.config import INTEGER, QuantizeConfig
from llmc.compress.skeleton import Skeleton, linears_of
from llmc.compress.zeros import mask_of
from llmc.console import warn
from llmc.errors import UserError
from llmc.families.names import role_of
from llmc.formats.layouts import listed
from llmc.formats.linears import get_weight
from llmc.formats.types import BLOCK_TYPES, FALLBACK, AnyType, IntegerType

ROTATING = ("rotate", "rotate+scaling", "auto")  # transforms that mix the columns of a matrix


@dataclass(frozen=True)
class Assignment:
    """The types of a model. name: of the whole: 'int4-sym-g32', 'q4_k', 'q4_k_m', ….
    types: {name in the model: type} of every linear of the decoder layers.
    missed: {linear: the type that it gets instead}, for linears whose rows the requested type cannot hold.
    end_types: {'embedding': type, 'head': type} for the export. The export chooses the type of a missing key.
    plan: the plan of a budget (budget.py); None without a budget.
    """

    name: str
    types: dict[str, AnyType]
    missed: dict[str, str] = field(default_factory=dict)
    end_types: dict[str, str] = field(default_factory=dict)
    plan: dict[str, Any] | None = None

    @cached_property  # it is asked for each linear, and a mixture has thousands of them
    def portable(self) -> IntegerType | None:
        """The integer type of all linears if it is one type, which a GPTQ checkpoint can hold; else None, and the folder
        holds GGUF blocks."""
        first = next(iter(self.types.values()))
        return first if isinstance(first, IntegerType) and all(qtype == first for qtype in self.types.values()) else None

    def stored(self, linear: str) -> str:
        """The name of a linear's type in the folder's format."""
        qtype = self.types[linear]
        return qtype.name if self.portable else str(qtype.gguf_type).lower()

    def counts(self) -> dict[str, int]:
        """{type: number of linears}, the most frequent type first."""
        return dict(Counter(self.stored(linear) for linear in self.types).most_common())


def assign(config: QuantizeConfig, skeleton: Skeleton) -> Assignment:
    """The types that `config` gives the model of `skeleton`. UserError if a type cannot hold a linear's rows."""
    found = _preset(config, skeleton) if config.preset else _uniform(config, skeleton)
    named = types_by_name(config, skeleton)
    if not named:
        return found
    found = replace(found, types={n: type_called(named[n]) if n in named else t for n, t in found.types.items()},
                    missed={n: t for n, t in found.missed.items() if n not in named})
    _check_rows(config, skeleton, found.types)
    return found


def types_by_name(config: QuantizeConfig, skeleton: Skeleton) -> dict[str, str]:
    """{linear: type} of --type-of. UserError if a pattern fits no linear, or some experts of a layer and not all of them:
    they are one tensor in a file."""
    found: dict[str, str] = {}
    linears = [name for _, name, _ in linears_of(skeleton)]
    for pattern, qtype in config.named_types:
        fits = [n for n in linears if fnmatchcase(n, f"*{pattern}*")]
        if not fits:
            raise UserError(f"--type-of {pattern}={qtype}: no linear of the decoder layers has a name with this part",
                            f"layer 0 has {listed(list(skeleton.linears(0)), 20)}")
        found |= dict.fromkeys(fits, qtype)
    types: dict[str, set[str | None]] = {}
    for name in linears:
        types.setdefault(skeleton.starred(name), set()).add(found.get(name))
    if mixed := [name for name, some in types.items() if len(some) > 1]:
        raise UserError(f"--type-of gives the experts of {mixed[0]} several types, and they are one tensor in a GGUF file",
                        "give a pattern that fits all experts of a layer, as in experts.*.down_proj=q6_k")
    return found


def type_called(name: str) -> AnyType:
    """The GGUF type of this name. q4_0 and q8_0 become an IntegerType, because its scale search is wider."""
    return IntegerType(INTEGER[name], 32) if name in INTEGER else BLOCK_TYPES[name]


def type_for(c: QuantizeConfig, width: int) -> AnyType:
    """The type that --bits or --type gives a linear with rows of `width` weights; --fallback if its blocks do not fit."""
    wanted = IntegerType(c.code_bits, c.group_size, c.sym) if c.type is None else type_called(c.type)
    other = c.fallback or FALLBACK.get(str(c.type))  # None if --type has blocks of 32
    return type_called(other) if other and width % block_size(wanted) else wanted


def block_size(qtype: AnyType) -> int:
    """The number of weights in a block. It must divide the length of a row."""
    return qtype.group_size if isinstance(qtype, IntegerType) else qtype.block


def _uniform(c: QuantizeConfig, skeleton: Skeleton) -> Assignment:
    """One type for all linears, and --fallback for those whose rows its blocks do not divide."""
    wanted = type_for(c, 0)
    types, missed = {}, {}
    for _, linear, module in linears_of(skeleton):
        types[linear] = type_for(c, get_weight(module).shape[1])
        if types[linear] != wanted:
            missed[linear] = str(types[linear].gguf_type).lower()
    _check_rows(c, skeleton, types)
    return Assignment(c.type or wanted.name, types, missed)


def _preset(c: QuantizeConfig, skeleton: Skeleton) -> Assignment:
    """llama.cpp's mix of types. With --method gptq it is the mix that llama-quantize makes with an importance matrix."""
    preset = str(c.preset)
    if skeleton.config.get_text_config().model_type == "falcon":
        raise UserError("llama.cpp's mixes have exceptions for Falcon, and llmc does not have them", "use --type")
    facts = presets.Facts.of(skeleton.config, imatrix=c.method == "gptq")
    types, missed = {}, {}
    for layer, linear, module in linears_of(skeleton):
        width = get_weight(module).shape[1]
        role = role_of(linear)
        name = presets.linear_type(preset, role, layer, facts, width)
        types[linear] = type_called(name)
        if name != presets.linear_type(preset, role, layer, facts, 256):
            missed[linear] = name
    _check_rows(c, skeleton, types)
    width, own_head = embedding_shape(skeleton)[1], has_own_head(skeleton)
    end_types = {"embedding": presets.end_type(preset, not own_head, width)}
    if own_head:
        end_types["head"] = presets.end_type(preset, True, width)
    return Assignment(preset, types, missed, end_types)


def _check_rows(c: QuantizeConfig, skeleton: Skeleton, types: dict[str, AnyType]) -> None:
    """UserError if the rows of a linear do not divide into its type's groups, or if GPTQ cannot pack them."""
    _check_packing(skeleton, types)
    widths = {linear: get_weight(module).shape[1] for _, linear, module in linears_of(skeleton)}
    uneven = sorted((w, block_size(types[linear])) for linear, w in widths.items() if w % block_size(types[linear]))
    if not uneven:
        return
    fits = [s for s in (128, 64, 32) if all(w % s == 0 for w in widths.values())]
    by_name = c.type or c.preset
    raise UserError(
        f"rows of {uneven[0][0]} weights do not divide into groups of {uneven[0][1]} in {skeleton.checkpoint.folder}",
        f"use --group-size {fits[0]}" if fits and not by_name else "no group size of 32, 64 or 128 fits this model"
        if not by_name else "no GGUF block type fits rows that are not a multiple of 32")


def _check_packing(skeleton: Skeleton, types: dict[str, AnyType]) -> None:
    """A GPTQ checkpoint packs the zero points of 32 / bits rows into a word (llmc.formats.gptq)."""
    qtype = Assignment("", types).portable
    if qtype is None:
        return
    per = 32 // qtype.bits
    if uneven := [(n, len(get_weight(m))) for _, n, m in linears_of(skeleton) if len(get_weight(m)) % per]:
        name, rows = uneven[0]
        raise UserError(f"{len(uneven)} linears of {skeleton.checkpoint.folder} have a number of rows that is no multiple of "
                        f"{per} (first {name}: {rows}), and a GPTQ checkpoint of {qtype.bits} bits cannot hold them",
                        f"use --type q4_1, q5_0 or q6_k, or leave them as floats with --keep {name.rpartition('.')[2]}")


def unfit(c: QuantizeConfig, skeleton: Skeleton) -> dict[str, list[str]]:
    """{rule: linears that the type cannot hold whatever --group-size or --fallback is}."""
    shapes = {n: get_weight(m).shape for _, n, m in linears_of(skeleton)}
    narrow = [n for n, (_, width) in shapes.items() if width % NARROWEST]
    found = {f"linears whose rows are no multiple of {NARROWEST}": narrow}
    if c.type is None and c.preset is None and c.target is None:
        qtype = Assignment("", {n: type_for(c, width) for n, (_, width) in shapes.items()}).portable
        if qtype is not None:
            per = 32 // qtype.bits
            found[f"linears whose number of rows is no multiple of {per} (a GPTQ checkpoint packs {per} into a word)"] = [
                n for n, (rows, width) in shapes.items() if rows % per and not width % NARROWEST]
    return {why: linears for why, linears in found.items() if linears}


def keeps_zeros(source: Path, c: QuantizeConfig, assignment: Assignment) -> bool:
    """Whether `source` was pruned to a mask that must be kept. UserError if the types or the transform cannot keep it and
    --lose-zeros is not given."""
    mask = mask_of(source)
    if mask is None:
        return False
    without = sorted({assignment.stored(n) for n, qtype in assignment.types.items() if not qtype.holds_zero})
    rotating = c.transform in ROTATING
    if not without and not rotating:
        return not c.lose_zeros
    why = (f"--transform {c.transform} may mix its columns" if rotating else
           f"{', '.join(without)} {'has' if len(without) == 1 else 'have'} no code for the value 0")
    if not c.lose_zeros:
        types = [name for name, qtype in BLOCK_TYPES.items() if qtype.holds_zero]
        hint = ("use --transform scaling" if rotating else
                f"use --bits 4 or 8, or --type {', '.join(types[:-1])} or {types[-1]} (and such a --fallback)")
        raise UserError(f"{source} was pruned to a mask ({100 * mask['sparsity']:.0f} % zeros), and {why}",
                        f"{hint}; or give --lose-zeros to accept the loss of the zeros")
    warn(f"the zeros of {source} are not kept: {why}")
    return False


def embedding_shape(skeleton: Skeleton) -> tuple[int, int]:
    """(rows, width) of the embedding."""
    rows, width = skeleton.model.get_input_embeddings().weight.shape
    return int(rows), int(width)


def has_own_head(skeleton: Skeleton) -> bool:
    """Whether the checkpoint holds a head that differs from the embedding. The export uses the same rule."""
    return not skeleton.ends.one
