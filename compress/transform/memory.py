"""The memory of `llmc transform`, step by step."""

from __future__ import annotations

from llmc.compress.memory import FLOAT, Running, Sizes, entering, reading, sampling
from llmc.compress.skeleton import Skeleton
from llmc.compress.text import SELF
from llmc.compress.transform.config import TransformConfig
from llmc.memory import PROCESS, TORCH, Memory, Step


def scaling(run: Running, calibrated: bool) -> list[Step]:
    """`ScalingStage`. calibrated: it needs text.

    `search_alpha` has the Hessians of all groups; one of them scaled, twice; the readers' weights, and some rows of them
    scaled and rounded. `apply_scaling` has float64 copies of a linear."""
    groups = run.sizes.groups
    hessians = sum(g.square for g in groups) if calibrated else max(g.square for g in groups)
    work = max(max(2 * g.square + 2 * g.weights, 4 * g.largest) for g in groups)
    gathering = [run.tracing(), run.gathering(1, groups_at_once=True)] if calibrated else []
    return [*gathering, Step("scaling a layer", {**run.held, **_kept(run.sizes), "Hessians": hessians,
                                                 "matrices of scaling": work})]


def _kept(s: Sizes) -> dict[str, int]:
    """`Transform.changing`: the changed experts of a layer, as float32."""
    experts = s.layer - s.resident
    return {"changed experts": FLOAT * experts} if experts else {}


def memory_of(skeleton: Skeleton, c: TransformConfig) -> Memory:
    """The steps of a transform."""
    s, run = Sizes.of(skeleton), Running.of(skeleton, c.seq_len, c.samples)
    steps = [reading(s), entering(s, c.seq_len)]
    if c.calibrated and c.calibration == SELF:
        steps.append(sampling(skeleton, c.seq_len, c.samples))
    if c.scaling != "none":
        steps += scaling(run, c.calibrated)
    if c.rotate != "none":
        work = 4 * max(g.largest for g in s.groups)  # `rotate_rows`: a linear and its product in float64
        steps.append(Step("rotating a layer", {**run.held, **_kept(s), "matrices of rotation": work}))
    if c.rotate == "r1r2":
        # `RotateStage.outside`: embedding and head in float32; a third one while one is copied or stored
        steps.append(Step("rotating embedding and head", {PROCESS: TORCH, "embedding and head": 3 * FLOAT * s.head},
                          2 * s.element * s.head))
    return Memory(steps)
