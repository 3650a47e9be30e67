"""The memory of an export, step by step: one tensor is written and compared at a time; then the runtime and torch run the
file (verify.py of each format)."""

from __future__ import annotations

from math import prod
from pathlib import Path

from llmc.export.parity import BIG, FEW, MANY
from llmc.formats.artifacts.table import artifact_at
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.quantized import linears, parts
from llmc.memory import PROCESS, TORCH, Memory, Step
from llmc.rounding.tables import CHUNK

FLOAT = 4
MORE = "export on a machine with more memory"
ROUNDING = 8 * FLOAT * CHUNK  # `rounding.tables.round_rows` of CHUNK weights: the weights, candidates and codes


def memory_of(folder: Path, file_bytes: int, ends: list[int], copies: int, runtime: int) -> Memory:
    """The steps of an export.

    file_bytes: of the result.  ends: number of weights of the embedding, and of a head of its own.  copies: bytes of the
    matrices that the runtime packs in another order.  runtime: bytes of its library."""
    ckpt = Checkpoint.open(folder)
    size = artifact_at(folder).weigh()
    codes = {name for linear in linears(ckpt) for name in parts(linear)}
    floats = [n for n in ckpt.names() if n not in codes]
    largest = max((ckpt.nbytes(n) for n in floats), default=0)
    checked = max((FLOAT * prod(ckpt.shape(n)) for n in floats if ckpt.dtype(n) != "F32"), default=0)
    vocabulary = artifact_at(folder).shape()["vocabulary"]
    tokens = FEW if size["parameters"] > BIG else MANY
    matrix = max((t.parameters for t in artifact_at(folder).tensors() if t.kind in ("attention", "mlp")), default=0)
    writing = {PROCESS: TORCH, "a float32 copy of the largest tensor": checked, "a tensor as it is written": largest,
               "rounding": ROUNDING}
    comparing = {
        PROCESS: TORCH + runtime, "the mapped file": file_bytes, "packed matrices": copies,
        # `end_matrices`, `as_stored`: both in float32, and one while it is made from its blocks
        "embedding and head in float32": FLOAT * (sum(ends) + max(ends)),
        "a matrix of the reference": 3 * FLOAT * matrix,  # `reference_logits`: codes, values and their product
        "logits": 3 * FLOAT * tokens * vocabulary,
    }
    return Memory([Step("writing", writing, largest), Step("comparing logits", comparing),
                   Step("reading back", {**writing, "the mapped file": file_bytes}, largest)])
