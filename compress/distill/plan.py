"""Estimates of the memory, disk and time of a distillation, made before it starts."""

from __future__ import annotations

import time
from typing import Any

import torch

from llmc.compress.distill.config import DistillConfig
from llmc.compress.ends import is_tied
from llmc.compress.skeleton import Skeleton
from llmc.compress.teaching.loss import CHUNK_BYTES
from llmc.compress.text import rows_in
from llmc.formats.linears import find_layers, get_weight, is_linear

RUNTIME = 600_000_000  # bytes of memory for Python, torch and transformers
SHARE = 0.5  # of a matrix product's speed that training reaches; attention, norms and optimizer take the rest
PROBE = (1024, 1024, 2048)  # shape of the measured product: rows, inner size, columns


def plan_of(student: Skeleton, teacher: Skeleton, c: DistillConfig, dtype: torch.dtype, device: torch.device,
            threads: int) -> dict[str, Any]:
    """Sizes, and estimates of memory and disk (bytes) and of time ('seconds'; None on devices other than the CPU)."""
    student_size, teacher_size = (_parameters(m) for m in (student, teacher))
    trained = student_size if c.lora is None else _adapter(student, c.lora)
    kept = 0 if c.teacher_top_k else teacher_size * dtype.itemsize
    tokens, held = c.steps * c.batch * c.accumulate * c.seq_len, c.held_out * c.seq_len
    # 4 bytes for a weight; 12 for its gradient and the two moments of Adam
    memory = RUNTIME + 4 * student_size + 12 * trained + kept + _activations(student, c, dtype) + 4 * CHUNK_BYTES
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
            "teacher_parameters": teacher_size, "trained": trained, "tokens": tokens, "memory_bytes": memory,
            "seconds": seconds,
            "disk_bytes": 3 * folder + 2 * 16 * trained + cached, "device": str(device), "threads": threads,
            "precision": str(dtype).removeprefix("torch."), "steps": c.steps, "loss": c.loss,
            "calibration_rows": {spec: rows for spec in c.calibration if (rows := rows_in(spec))}}


def _parameters(m: Skeleton) -> int:
    """The number of parameters. A tied matrix counts once (a skeleton holds it twice)."""
    twice = m.model.get_output_embeddings().weight.numel() if is_tied(m) else 0
    return sum(p.numel() for p in m.model.parameters()) - twice


def _active(m: Skeleton) -> int:
    """The number of multiplications for one token."""
    head = m.model.get_output_embeddings().weight.numel()
    return int(head + sum(get_weight(x).numel() for layer in m.layers for x in layer.modules() if is_linear(x)))


def _adapter(m: Skeleton, rank: int) -> int:
    """The number of parameters of the adapters."""
    _, layers = find_layers(m.model)
    return sum(rank * sum(get_weight(x).shape) for layer in layers for x in layer.modules() if is_linear(x))


def _activations(m: Skeleton, c: DistillConfig, dtype: torch.dtype) -> int:
    """Bytes of the activations that the backward pass needs. A layer holds about the input and output of each linear and four
    copies of the residual stream. With checkpointing there is one such layer, and one copy of the stream for every layer."""
    hidden = m.config.get_text_config().hidden_size
    layers = [sum(map(sum, shapes)) * dtype.itemsize + 16 * hidden for shapes in m.shapes]
    return c.batch * c.seq_len * (max(layers) + 4 * hidden * len(layers) if c.checkpointing else sum(layers))


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
