"""The memory of `llmc quantize`, step by step."""

from __future__ import annotations

from collections.abc import Iterable

from llmc.compress.memory import (
    FLOAT,
    Running,
    Sizes,
    entering,
    gptq_work,
    judging,
    reading,
    rtn_work,
    sampling,
    whole_model,
)
from llmc.compress.quantize.config import QuantizeConfig
from llmc.compress.skeleton import Skeleton
from llmc.compress.text import SELF
from llmc.compress.transform.choose import HELD_MOST
from llmc.compress.transform.memory import scaling
from llmc.formats.types import AnyType, BlockType, IntegerType
from llmc.memory import PROCESS, TORCH, Step
from llmc.rounding.codebook import CHUNK

BOOK = 3 * FLOAT * CHUNK  # with a codebook: scores of its entries and what they are made of, and the tables of cells


def memory_of(skeleton: Skeleton, c: QuantizeConfig, types: Iterable[AnyType], reference: bool) -> list[Step]:
    """The steps of a quantization. types: of the linears.  reference: the unchanged model runs too."""
    sizes, kinds = Sizes.of(skeleton), set(types)
    steps = [reading(sizes)]
    if c.calibrated and c.calibration == SELF:
        steps.append(sampling(skeleton, c.seq_len, c.samples))
    if c.method == "gptq":
        run = Running.of(skeleton, c.seq_len, c.samples)
        steps += [entering(sizes, c.seq_len), run.tracing(), run.gathering(3 if reference else 1, not c.true_sequential),
                  _rounding(run.held, "GPTQ", sizes, kinds)]
        if c.transform != "none":
            steps += scaling(run, calibrated=True)
        if c.transform == "auto":  # each candidate is compared with the base on at most HELD_MOST sequences
            steps += judging(sizes, HELD_MOST * c.seq_len, c.seq_len, run)
    else:
        steps.append(_rounding({PROCESS: TORCH, "one layer in float32": FLOAT * sizes.resident}, "rounding", sizes, kinds))
    return steps


def _rounding(held: dict[str, int], what: str, s: Sizes, types: set[AnyType]) -> Step:
    """The layer's codes stay too: a byte for each weight."""
    work = max(gptq_work(g, *_factors(t, g.width)) if what == "GPTQ" else rtn_work(g, _factors(t, g.width)[1])
               for g in s.groups for t in types)
    if any(isinstance(t, BlockType) and t.codebook is not None for t in types):
        work += BOOK
    return Step(what, {**held, "codes": s.layer, f"matrices of {what}": work})


def _factors(qtype: AnyType, width: int) -> tuple[int, int, int]:
    """(weights that share a factor, factors of a block, weights that share a scale)."""
    if isinstance(qtype, IntegerType):
        group = qtype.group_size if qtype.group_size > 0 else width
        return group, 1, group
    return qtype.block, 1 + qtype.has_min, qtype.group


def measuring(skeleton: Skeleton, sequences: int, length: int) -> Step:
    """`budget.measure`, after `loading`: the whole model, the outputs of its layers and the logits for every sequence; then
    for one matrix its copy and its noise while a sequence runs (`Probe.sensitivity`), with what `divergence` makes of
    logits."""
    s = Sizes.of(skeleton)
    matrix = max(s.head, *(g.largest // FLOAT for g in s.groups))
    logits = FLOAT * s.vocabulary * length
    return Step("measuring the sensitivity of matrices", {
        PROCESS: TORCH, **whole_model(s), "outputs of layers": FLOAT * s.hidden * s.layers * sequences * length,
        "a matrix and its noise": 2 * FLOAT * matrix, "activations": length * s.per_token,
        # of the unchanged model; new ones, and two log-softmaxes, their difference, exponential and product
        "logits": (sequences + 6) * logits})
