"""The memory of `llmc transform`, step by step."""

from __future__ import annotations

from llmc.compress.memory import FLOAT, Running, Sizes, entering, reading, sampling
from llmc.compress.skeleton import Skeleton
from llmc.compress.text import SELF
from llmc.compress.transform.config import TransformConfig
from llmc.memory import PROCESS, TORCH, Memory, Step


def memory_of(skeleton: Skeleton, c: TransformConfig) -> Memory:
    """The steps of a transform."""
    s, run = Sizes.of(skeleton), Running.of(skeleton, c.seq_len)
    steps = [reading(s), entering(s, c.seq_len)]
    if c.calibrated:
        steps += [run.tracing(), run.gathering(1, groups_at_once=True)]
        if c.calibration == SELF:
            steps.append(sampling(skeleton, c.seq_len, c.samples))
    if c.scaling != "none":
        # `search_alpha`: the Hessians of all groups; one scaled, twice; the readers' weights, some rows of them scaled and
        # rounded.  `apply_scaling`: float64 copies of a linear
        hessians = sum(g.square for g in s.groups) if c.calibrated else max(g.square for g in s.groups)
        work = max(max(2 * g.square + 2 * g.weights, 4 * g.largest) for g in s.groups)
        steps.append(Step("scaling a layer", {**run.held, "Hessians": hessians, "matrices of scaling": work}))
    if c.rotate != "none":
        work = 4 * max(g.largest for g in s.groups)  # `rotate_rows`: a linear and its product in float64
        steps.append(Step("rotating a layer", {**run.held, "matrices of rotation": work}))
    if c.rotate == "r1r2":
        # `RotateStage.outside`: embedding and head in float32; a third one while one is copied or stored
        steps.append(Step("rotating embedding and head", {PROCESS: TORCH, "embedding and head": 3 * FLOAT * s.head},
                          2 * s.element * s.head))
    return Memory(steps)
