"""The choice of the accuracy levels in the file, from speed and KL divergence measured on the written folder in ONNX Runtime.

MatMulNBits' `accuracy_level` sets the type of its inputs in the product: 0 is float32, 4 is int8 in blocks. The head may
have its own level: ONNX Runtime's CPU provider has a kernel for 8-bit matrices at level 4 only, and often only the head has
8 bits.
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

STEPS, REPEATS = 8, 3  # tokens decoded in a measurement, and the number of measurements
ENOUGH = 3.0  # seconds after which measuring stops: at level 0 ONNX Runtime may take seconds for a token (onnx_lint.py)
# Limits for the loss from rounded activations on the check text. A 4-bit type itself has a KL divergence of 0.1 or more and a
# top-1 agreement of 70 to 80 %. llama.cpp always rounds activations in this way. On SmolLM2-135M level 4 gave 0.0045 and
# 94 %; with a wrong kernel (onnxruntime#29849) the divergence is far larger
MOST_KLD, LEAST_TOP1 = 0.01, 0.9
LEAST_GAIN = 1.05  # geometric mean of the speed-ups of prefill and decoding
BOTH = (0, 4)


@dataclass(frozen=True)
class Levels:
    """The accuracy level of the decoder's matrices, and of the head if it can differ."""

    level: int
    head: int | None = None

    def __str__(self) -> str:
        return f"level {self.level}" + (f" with the head at {self.head}" if self.head not in (None, self.level) else "")


@dataclass(frozen=True)
class Measured:
    """A measurement of levels on the check text.

    kld: mean KL divergence in nats from level 0 everywhere; top1_agreement with it, 0 to 1.
    prefill, decode: tokens per second."""

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
        """The geometric mean of the speed-ups of prefill and decoding over `other`."""
        return (self.prefill / other.prefill * self.decode / other.decode) ** 0.5

    def against(self, other: Measured) -> str:
        return (f"prefill {self.prefill:.0f} against {other.prefill:.0f} tokens/s, decoding {self.decode:.1f} against "
                f"{other.decode:.1f}")


def candidates(folder: OnnxFolder, config: OnnxExportConfig) -> list[Levels]:
    """The levels that the options allow, lowest first; empty if no matrix is quantized in blocks."""
    head = folder.head()
    own_head = head is not None and head.op_type == "MatMulNBits"
    matrices = sum(b["matrices"] for b in folder.matmul_nbits())
    if config.head_accuracy_level is not None and not own_head:
        raise UserError(f"--head-accuracy-level {config.head_accuracy_level}: the head is not quantized in blocks, so it is "
                        "computed in float32", "leave it out, or quantize the head with --head-bits 8 or 4")
    if not matrices and "DequantizeLinear" not in folder.operators():
        return []
    asked = config.head_accuracy_level or config.accuracy_level
    heads = (None,) if not own_head else BOTH if asked == "auto" else (int(asked),)
    levels = BOTH if config.accuracy_level == "auto" else (int(config.accuracy_level),)
    if config.accuracy_level == "auto" and own_head and matrices == 1:  # only the head has a level
        levels = BOTH[:1]
    return [Levels(*pair) for pair in itertools.product(levels, heads)]


def measure(folder: OnnxFolder, ids: np.ndarray, threads: int, asked: list[Levels]) -> dict[Levels, Measured]:
    """Measure each of the levels, and level 0 everywhere as the reference, one session at a time."""
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
    """The shortest times, in seconds, of a prefill of `ids` and of one decoded token after it, over a few repeats.

    `ids` are cut so that the decoded tokens fit into the context."""
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
    """The fastest of the levels `asked` within the loss limits, and the reason. Without a speed-up, the lowest levels."""
    lowest = found[asked[0]]
    if len(asked) == 1:
        exact = next(iter(found.values()))
        return asked[0], f"as asked; against {exact.levels}: {lowest.against(exact)}; {lowest.lost}"
    others = [found[levels] for levels in asked[1:]]
    fit = [m for m in others if m.is_close and m.gain(lowest) >= LEAST_GAIN]
    taken = max(fit, key=lambda m: m.gain(lowest), default=lowest)
    why = [f"{taken.levels} is the fastest with a small loss: {taken.against(lowest)}; {taken.lost}"] if fit else []
    for m in others:
        if not m.is_close:
            why.append(f"{m.levels} loses too much: {m.lost} (at most {MOST_KLD} and at least {LEAST_TOP1:.0%}); "
                       f"{m.against(lowest)}")
        elif not fit:
            why.append(f"{m.levels} is not faster here: {m.against(lowest)}")
    return taken.levels, "; ".join(why)


def write(folder: OnnxFolder, levels: Levels) -> None:
    """Write the levels into model.onnx. With --int4 qdq the level is a session option: see files.finish_genai."""
    temporary = folder.model.with_name(f".{folder.model.name}.partial")
    temporary.write_bytes(folder.edit(levels.level, levels.head).proto.SerializeToString())
    os.replace(temporary, folder.model)


def settle(work: Path, config: OnnxExportConfig, ids: np.ndarray, threads: int) -> tuple[Levels, str, list[Measured]]:
    """Measure, choose and write the levels; return them, the reason and the measurements."""
    folder = open_onnx(work)
    asked = candidates(folder, config)
    if not asked:
        return Levels(0), "no matrix is quantized in blocks", []
    found = measure(folder, ids, threads, asked)
    levels, reason = choose(asked, found)
    write(folder, levels)
    return levels, reason, list(found.values())
