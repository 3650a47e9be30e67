"""`llmc transform`: write a float model with the same output that loses less when it is quantized."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

from llmc.compress.coverage import checked
from llmc.compress.ends import is_tied
from llmc.compress.preparation import calibration_text, check_weights, open_float, sampled_file
from llmc.compress.quantize.assignment import type_for
from llmc.compress.skeleton import Skeleton
from llmc.compress.text import Calibration, rows_in
from llmc.compress.transform.config import TransformConfig
from llmc.compress.transform.memory import memory_of
from llmc.compress.transform.roles import family_of
from llmc.compress.transform.stage import RotateStage, ScalingStage, Stage
from llmc.compress.zeros import mask_of
from llmc.console import say, size, warn
from llmc.errors import UserError
from llmc.files import check_disk
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.manifest import check_output, note_last
from llmc.formats.source import hash_source, model_name
from llmc.locks import locked
from llmc.machine import physical_cores, torch_device
from llmc.precision import matmul_precision, prepare_cpu
from llmc.sources.resolve import resolve_model
from llmc.temporary import remove

Q8_0_BYTES = 34 / 32  # bytes per weight


def transform(model: str | Path, config: TransformConfig) -> dict[str, Any]:
    """Write a float folder with the same output as `model`.

    Returns {'out', 'passes' [of this run], 'proof', 'left', 'widened', 'grown_bytes', 'untied_bytes', 'seconds'}; with
    `dry_run` the plan.
    """
    start = time.monotonic()
    threads = config.threads or physical_cores()
    prepare_cpu(threads)
    if not config.dry_run:
        check_output(config.out, "hf", model, config)
    source = resolve_model(model)
    out = config.out or Path("-".join([model_name(source), *(n for n in (config.rotate, config.scaling) if n != "none")]))
    skeleton = check(source, config)
    memory = memory_of(skeleton, config)
    if config.dry_run:
        return {"source": str(source), "out": str(out), "scaling": config.scaling, "rotate": config.rotate,
                "layers": len(skeleton.layers), "disk_bytes": disk_bytes(skeleton, config), **memory.plan(),
                "calibration": config.calibration if config.calibrated else None,
                "calibration_rows": rows_in(config.calibration) if config.calibrated else {},
                "tokens": config.samples * config.seq_len, "device": config.device, "threads": threads,
                "matmul": matmul_precision()}
    check_output(out, "hf", source, config)
    check_disk(out, disk_bytes(skeleton, config), "transforming")
    memory.check("transforming", "lower --seq-len")
    check_weights(skeleton.checkpoint)
    kept = sampled_file(out.with_name(f".{out.name}.unfinished"))
    calibration = None
    with locked(out):
        if config.calibrated:
            calibration = calibration_text(skeleton, hash_source(source), config, threads, kept)
        result = make(source, out, config, calibration, threads)
        remove(kept)
    note_last(out, "hf")
    return {**result, "seconds": round(time.monotonic() - start, 1)}


def check(source: Path, config: TransformConfig) -> Skeleton:
    """Make all checks before any work. Returns the model without weights. UserError if the options do not fit the model."""
    checkpoint = open_float(source)
    if config.rotate != "none" and mask_of(source):
        raise UserError(f"{source} was pruned to a mask, and --rotate {config.rotate} would fill its zeros",
                        "use --scaling alone, which keeps zeros, or rotate before you prune")
    skeleton = Skeleton(checkpoint, str(torch_device(config.device)))
    family = family_of(skeleton.config)
    checked(skeleton, "transformed")
    if (limit := getattr(skeleton.config.get_text_config(), "clip_qkv", None)) is not None:
        raise UserError(f"{source} limits its values to {limit:g} (clip_qkv): a transform would move them beyond the limit",
                        "quantize without a transform")
    if config.rotate == "r1r2":
        if family.unrotatable:
            raise UserError(f"--rotate r1r2 cannot rotate the residual stream of {source}: {family.unrotatable}",
                            "use --rotate r2")
        if is_tied(skeleton) and not config.untie:
            raise UserError(f"--rotate r1r2 needs a head that is not tied to the embedding, and {source} has a tied one: a "
                            f"separate head takes {size(untied_bytes(skeleton))} in an 8-bit file",
                            "add --untie to accept this size, or use --rotate r2, which adds no bytes")
    return skeleton


def untied_bytes(skeleton: Skeleton) -> int:
    """The bytes of a separate head in Q8_0."""
    return round(skeleton.model.get_output_embeddings().weight.numel() * Q8_0_BYTES)


def disk_bytes(skeleton: Skeleton, config: TransformConfig) -> int:
    """The peak of disk use in bytes: the model in float32 as layers and as a folder, the folder of the stage before, and with
    calibration text three files of states."""
    hidden = skeleton.config.get_text_config().hidden_size
    states = 3 * config.samples * config.seq_len * hidden if config.calibrated else 0
    return 4 * (3 * sum(p.numel() for p in skeleton.model.parameters()) + states)


def make(source: Path, out: Path, config: TransformConfig, calibration: Calibration | None, threads: int) -> dict[str, Any]:
    """Run the stages: first the rotation, then the scaling, which scales the rotated channels. Returns the result of
    `transform` without 'seconds'."""
    between = out.with_name(f".{out.name}.rotated")
    shared: dict[str, Any] = {"device": str(torch_device(config.device)), "threads": threads, "resume": config.resume}
    stages: list[Stage] = []
    if config.rotate != "none":
        to = out if config.scaling == "none" else between
        stages.append(RotateStage(source, to, config.numbers_of("rotate"), **shared))
    if config.scaling != "none":
        stages.append(ScalingStage(stages[0].out if stages else source, out, config.numbers_of("scaling"), **shared,
                                 type_of=partial(type_for, config.target()), calibration=calibration))
    passes = [stage.run()["passes"][-1] for stage in stages]
    remove(between)
    left = list(dict.fromkeys(line for p in passes for r in p["layers"] for line in r["left"]))
    for line in left:
        warn(f"not transformed: {line}")
    result = {"out": str(out), "passes": passes, "proof": max(p["proof"] for p in passes), "left": left,
              "widened": sum(p["widened"] for p in passes), "grown_bytes": sum(p["grown_bytes"] for p in passes),
              "untied_bytes": 0}
    if config.untie:
        result["untied_bytes"] = untied_bytes(Skeleton(Checkpoint.open(source), "cpu"))
    if result["grown_bytes"] > 0:
        say(f"tensors that the source's type cannot hold exactly are stored as float32: the folder is "
            f"{size(result['grown_bytes'])} larger, and a quantized model of it is not")
    return result
