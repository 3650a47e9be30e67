"""Which accuracy levels the file asks for: what each costs, measured on the written folder in ONNX Runtime, and the choice.

MatMulNBits' `accuracy_level` says what its inputs are rounded to before the product: 0 nothing, 4 int8 in blocks. The head
may have a level of its own: ONNX Runtime's CPU provider has a kernel for 8-bit matrices at level 4 only, and the head is the
one matrix that is often of 8 bits.
"""

from __future__ import annotations

import itertools
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmc.errors import UserError
from llmc.export.onnx.config import OnnxExportConfig
from llmc.export.parity import compare_logits
from llmc.formats.onnx_folder import OnnxFolder, open_onnx
from llmc.runtimes.onnx_model import OnnxModel

STEPS, REPEATS = 8, 3  # tokens decoded in a measurement, and how often it is made
ENOUGH = 3.0  # seconds after which no more is measured: at level 0 a token may take seconds (onnx_lint.py)
# What rounding may do to the text of the check. A 4-bit type itself loses 0.1 or more and keeps 70 to 80 % of the top tokens;
# llama.cpp rounds activations alike, always. On SmolLM2-135M level 4 cost 0.0045 and kept 94 %; where a kernel goes wrong
# (onnxruntime#29849) it is far more
MOST_KLD, LEAST_TOP1 = 0.01, 0.9
LEAST_GAIN = 1.05  # geometric mean of what prefill and decoding gain
BOTH = (0, 4)


@dataclass(frozen=True)
class Levels:
    """Of the decoder's matrices, and of the head where it can have one of its own."""

    level: int
    head: int | None = None

    def __str__(self) -> str:
        return f"level {self.level}" + (f" with the head at {self.head}" if self.head not in (None, self.level) else "")


@dataclass(frozen=True)
class Measured:
    """Levels on the text of the check, against level 0 in all: mean divergence in nats, share of top tokens kept. Speeds in
    tokens per second."""

    levels: Levels
    kld: float
    top1_agreement: float
    prefill: float
    decode: float

    @property
    def is_close(self) -> bool:
        return self.kld <= MOST_KLD and self.top1_agreement >= LEAST_TOP1  # NaN must not pass

    @property
    def lost(self) -> str:
        return f"a KL divergence of {self.kld:.2g} and {self.top1_agreement:.1%} of the top tokens kept"

    def gain(self, other: Measured) -> float:
        """Geometric mean of the gains over another's speeds."""
        return (self.prefill / other.prefill * self.decode / other.decode) ** 0.5

    def against(self, other: Measured) -> str:
        return (f"prefill {self.prefill:.0f} against {other.prefill:.0f} tokens/s, decoding {self.decode:.1f} against "
                f"{other.decode:.1f}")


def candidates(folder: OnnxFolder, config: OnnxExportConfig) -> list[Levels]:
    """What the options leave open, the lowest levels first; empty where no matrix is quantized in blocks."""
    head = folder.head()
    own_head = head is not None and head.op_type == "MatMulNBits"
    matrices = sum(b["matrices"] for b in folder.matmul_nbits())
    if config.head_accuracy_level is not None and not own_head:
        raise UserError(f"--head-accuracy-level {config.head_accuracy_level}: the head is not quantized in blocks, and is "
                        "computed in float32", "leave it out, or quantize the head with --head-bits 8 or 4")
    if not matrices and "DequantizeLinear" not in folder.operators():
        return []
    asked = config.head_accuracy_level or config.accuracy_level
    heads = (None,) if not own_head else BOTH if asked == "auto" else (int(asked),)
    levels = BOTH if config.accuracy_level == "auto" else (int(config.accuracy_level),)
    if config.accuracy_level == "auto" and own_head and matrices == 1:  # no matrix but the head has a level
        levels = BOTH[:1]
    return [Levels(*pair) for pair in itertools.product(levels, heads)]


def measure(folder: OnnxFolder, ids: np.ndarray, threads: int, asked: list[Levels]) -> dict[Levels, Measured]:
    """Each of the levels, and level 0 in all, one session at a time."""
    exact = Levels(0, None if asked[0].head is None else 0)
    found: dict[Levels, Measured] = {}
    reference = np.empty(0)
    for levels in dict.fromkeys([exact, *asked]):
        runtime = OnnxModel(folder.edit(levels.level, levels.head), len(ids) + STEPS, threads)
        logits = runtime.logits(ids)
        reference = logits if levels == exact else reference
        _, kld, top1 = compare_logits(reference, logits)
        prefill, decode = seconds(runtime, ids)
        found[levels] = Measured(levels, kld, top1, len(ids) / prefill, 1 / decode)
        runtime.close()
    return found


def seconds(runtime: OnnxModel, ids: np.ndarray) -> tuple[float, float]:
    """Least time of a prefill of `ids` (or as many as leave room) and of a decoded token after it, over a few repeats."""
    ids = ids[: max(1, runtime.context - STEPS)]
    prefill, decode = list[float](), list[float]()
    begun = time.perf_counter()
    while not decode or (len(prefill) <= REPEATS and time.perf_counter() - begun < ENOUGH):
        start = time.perf_counter()
        logits = runtime.prefill(ids)
        prefill.append(time.perf_counter() - start)
        for _ in range(STEPS):
            start = time.perf_counter()
            logits = runtime.decode(int(logits.argmax()))
            decode.append(time.perf_counter() - start)
            if start - begun > ENOUGH:
                break
    return min(prefill), min(decode)


def choose(asked: list[Levels], found: dict[Levels, Measured]) -> tuple[Levels, str]:
    """The fastest of the levels asked for that loses little, and why. The lowest need no reason; others a gain."""
    lowest = found[asked[0]]
    if len(asked) == 1:
        exact = next(iter(found.values()))
        return asked[0], f"as asked; against {exact.levels}: {lowest.against(exact)}; {lowest.lost}"
    others = [found[levels] for levels in asked[1:]]
    fit = [m for m in others if m.is_close and m.gain(lowest) >= LEAST_GAIN]
    taken = max(fit, key=lambda m: m.gain(lowest), default=lowest)
    why = [f"{taken.levels} is the fastest that loses little: {taken.against(lowest)}; {taken.lost}"] if fit else []
    for m in others:
        if not m.is_close:
            why.append(f"{m.levels} loses too much: {m.lost} (at most {MOST_KLD} and at least {LEAST_TOP1:.0%}); "
                       f"{m.against(lowest)}")
        elif not fit:
            why.append(f"{m.levels} is not faster here: {m.against(lowest)}")
    return taken.levels, "; ".join(why)


def write(folder: OnnxFolder, levels: Levels) -> None:
    """Write the levels into model.onnx. That of --int4 qdq is the session's: files.finish_genai."""
    temporary = folder.model.with_name(f".{folder.model.name}.partial")
    temporary.write_bytes(folder.edit(levels.level, levels.head).proto.SerializeToString())
    os.replace(temporary, folder.model)


def settle(work: Path, config: OnnxExportConfig, ids: np.ndarray, threads: int) -> tuple[Levels, str, list[Measured]]:
    """Measure, choose and write; returns the levels, why, and what was measured."""
    folder = open_onnx(work)
    asked = candidates(folder, config)
    if not asked:
        return Levels(0), "no matrix is quantized in blocks", []
    found = measure(folder, ids, threads, asked)
    levels, reason = choose(asked, found)
    write(folder, levels)
    return levels, reason, list(found.values())
