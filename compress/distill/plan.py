"""Estimates of the memory, disk and time of a distillation, made before it starts."""

from __future__ import annotations

import time
from typing import Any

import torch

from llmc.compress.distill.config import DistillConfig
from llmc.compress.memory import FLOAT, loading, reading, sampling, weights_of
from llmc.compress.skeleton import Skeleton
from llmc.compress.teaching.memory import distilling, model_of, opening, sampled
from llmc.compress.text import rows_in
from llmc.formats.linears import find_layers, get_weight, is_linear
from llmc.memory import Memory

SHARE = 0.5  # of a matrix product's speed that training reaches; attention, norms and optimizer take the rest
PROBE = (1024, 1024, 2048)  # shape of the measured product: rows, inner size, columns


def plan_of(student: Skeleton, teacher: Skeleton, c: DistillConfig, dtype: torch.dtype, device: torch.device,
            threads: int) -> dict[str, Any]:
    """Sizes, and estimates of memory and disk (bytes) and of time ('seconds'; None on devices other than the CPU)."""
    student_size, teacher_size = (weights_of(m) for m in (student, teacher))
    trained = student_size if c.lora is None else _adapter(student, c.lora)
    tokens, held = c.steps * c.batch * c.accumulate * c.seq_len, c.held_out * c.seq_len
    cached = (tokens + held) * (8 * c.teacher_top_k + 4) if c.teacher_top_k else 0
    folder = sum(p.stat().st_size for p in student.checkpoint.files)
    seconds = None
    if device.type == "cpu":
        checks = 1 + -(-c.steps // c.check_every)
        backward = 2 if c.lora is None else 1  # frozen weights need no gradient, only their inputs do
        runs = 1 + backward + c.checkpointing
        work = 2 * ((tokens * runs + held * checks) * _active(student) + (tokens + held) * _active(teacher))
        seconds = round(work / (SHARE * product_rate(dtype)))
    return {"layers": [len(student.layers), len(teacher.layers)], "parameters": student_size,
            "teacher_parameters": teacher_size, "trained": trained, "tokens": tokens, "seconds": seconds,
            **memory_of(student, teacher, c, dtype).plan(),
            "disk_bytes": 3 * folder + 2 * 16 * trained + cached, "device": str(device), "threads": threads,
            "precision": str(dtype).removeprefix("torch."), "steps": c.steps, "loss": c.loss,
            "calibration_rows": {spec: rows for spec in c.calibration if (rows := rows_in(spec))}}


def memory_of(student: Skeleton, teacher: Skeleton, c: DistillConfig, dtype: torch.dtype) -> Memory:
    """The steps of a distillation."""
    one, other = model_of(student), model_of(teacher)
    adapters = 0 if c.lora is None else _adapter(student, c.lora)
    mapped = one.sizes.stored if one.sizes.element < FLOAT else 0
    steps = [reading(one.sizes), reading(other.sizes), loading(other.sizes, "the teacher"),
             opening(one, other, c, dtype, mapped), distilling(one, other, c, dtype, adapters or one.sizes.weights, adapters)]
    if samples := sampled(c):
        steps.append(sampling(teacher, c.seq_len, samples))
    return Memory(steps)


def _active(m: Skeleton) -> int:
    """The number of multiplications for one token."""
    head = m.model.get_output_embeddings().weight.numel()
    return int(head + sum(get_weight(x).numel() for layer in m.layers for x in layer.modules() if is_linear(x)))


def _adapter(m: Skeleton, rank: int) -> int:
    """The number of parameters of the adapters."""
    _, layers = find_layers(m.model)
    return sum(rank * sum(get_weight(x).shape) for layer in layers for x in layer.modules() if is_linear(x))


def product_rate(dtype: torch.dtype, seconds: float = 0.2) -> float:
    """Floating-point operations per second (a multiply-add counts as two) of a matrix product in `dtype`, measured now on
    this machine for about `seconds` seconds."""
    rows, inner, out = PROBE
    a, b = torch.ones(rows, inner, dtype=dtype), torch.ones(inner, out, dtype=dtype)
    a @ b
    done, start = 0, time.monotonic()
    while time.monotonic() - start < seconds:
        a @ b
        done += 1
    return done * 2 * rows * inner * out / (time.monotonic() - start)
