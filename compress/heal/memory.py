"""The memory of `llmc heal`, step by step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from llmc.compress.calibration import sequences_at_once
from llmc.compress.heal.config import HealConfig
from llmc.compress.memory import FLOAT, entering, loading, reading, sampling
from llmc.compress.skeleton import Skeleton, linears_of
from llmc.compress.teaching.memory import healing, healing_block, model_of, opening, sampled
from llmc.formats import quantized
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.linears import get_weight
from llmc.formats.types import AnyType, IntegerType
from llmc.memory import Memory, Step
from llmc.precision import training_dtype


@dataclass(frozen=True)
class Codes:
    """What `HealedLinear` holds of all quantized linears. held: bytes of levels, factors and their integers.  trained: number
    of trained factors."""

    held: int
    trained: int

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Codes:
        names = quantized.linears(checkpoint)
        return cls.of_all([(quantized.shape(checkpoint, n), quantized.type_of(checkpoint, n)) for n in names])

    @classmethod
    def of_all(cls, linears: Iterable[tuple[tuple[int, int], AnyType]]) -> Codes:
        """linears: shape and type of each."""
        found = [_codes(shape, qtype) for shape, qtype in linears]
        return cls(sum(held for held, _ in found), sum(trained for _, trained in found))


def _codes(shape: tuple[int, int], qtype: AnyType) -> tuple[int, int]:
    """(bytes held, factors trained) of one linear."""
    weights = shape[0] * shape[1]
    if isinstance(qtype, IntegerType):
        group = qtype.group_size if qtype.group_size > 0 else shape[1]
        factors, integers, wide = weights // group, 0, qtype.bits == 8
    else:
        factors = weights // qtype.block * (1 + qtype.has_min)
        integers = weights // qtype.group * sum(r is not None for r in (qtype.scale_range, qtype.min_range))
        wide = max(map(abs, qtype.levels)) > 127
    return weights * (1 + wide) + FLOAT * (2 * factors + integers), factors


def after_quantizing(model: Skeleton, types: dict[str, AnyType], c: HealConfig) -> list[Step]:
    """The steps of healing a model that is not quantized yet. types: that its linears will have, by name."""
    one, dtype = model_of(model), training_dtype(c.precision, model.device)
    shapes = {name: tuple(get_weight(m).shape) for _, name, m in linears_of(model)}
    codes = Codes.of_all([((shapes[n][0], shapes[n][1]), qtype) for n, qtype in types.items()])
    return [loading(one.sizes, "the teacher"), healing(one, one, c, dtype, codes.trained, codes.held)]


def memory_of(student: Skeleton, teacher: Skeleton, c: HealConfig, dtype: torch.dtype) -> Memory:
    """The steps of a healing."""
    one, other, codes = model_of(student), model_of(teacher), Codes.of(student.checkpoint)
    steps = [reading(other.sizes)]
    if samples := sampled(c):
        steps.append(sampling(teacher, c.seq_len, samples))
    if c.scope == "block":
        judged, layers = c.seq_len * sequences_at_once(teacher, c.seq_len), one.sizes.layers
        return Memory([*steps, entering(other.sizes, c.seq_len),
                       healing_block(one, c, dtype, codes.trained // layers, codes.held // layers, judged)])
    return Memory([*steps, loading(other.sizes, "the teacher"), opening(one, other, c, dtype, 0),
                   healing(one, other, c, dtype, codes.trained, codes.held)])
