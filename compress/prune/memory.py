"""The memory of `llmc prune`, step by step."""

from __future__ import annotations

from llmc.compress.memory import (
    FLOAT,
    Running,
    Sizes,
    entering,
    judging,
    loading,
    reading,
    removing,
    sampling,
    sparsegpt_work,
)
from llmc.compress.prune.config import PruneConfig
from llmc.compress.skeleton import Skeleton
from llmc.compress.text import SELF
from llmc.memory import Memory, Step

SUMS = {"wanda": 1, "sparsegpt": 3}  # matrices [in, in] of a group: the Hessian; the drift and its Hessian


def memory_of(skeleton: Skeleton, c: PruneConfig) -> Memory:
    """The steps of a pruning, its judgement included."""
    sizes, run = Sizes.of(skeleton), Running.of(skeleton, c.seq_len, c.sequences)
    steps = [reading(sizes), entering(sizes, c.seq_len), *judging(sizes, c.held_out * c.seq_len, c.seq_len, run)]
    if c.calibration == SELF:
        steps.append(sampling(skeleton, c.seq_len, c.sequences))
    if c.method in SUMS:
        work = max(map(sparsegpt_work, sizes.groups)) if c.method == "sparsegpt" else 4 * max(g.largest for g in sizes.groups)
        steps += [run.tracing(), run.gathering(SUMS[c.method]),
                  Step("pruning a layer", {**run.held, "pruned weights": sizes.element * sizes.layer,
                                           "matrices of pruning": work})]
    elif c.method == "depth" and c.by == "kl":
        steps += [loading(sizes), removing(sizes, c.seq_len)]
    elif c.method == "magnitude":
        steps.append(Step("pruning a layer", {**run.held, "weights, their sizes and ranks": 5 * FLOAT * sizes.layer}))
    else:
        steps.append(run.tracing())
    return Memory(steps)
