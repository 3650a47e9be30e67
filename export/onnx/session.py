"""The written file in ONNX Runtime, for the exporter's own checks: logits of a text, and what a level of accuracy costs.

MatMulNBits' `accuracy_level` says what the activations are rounded to before the product: 0 nothing, 4 int8 in blocks.
With --int4 qdq it is an option of the session instead (session.qdq_matmulnbits_accuracy_level), read when ONNX Runtime
fuses DequantizeLinear and MatMul.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from llmc.export.parity import compare_logits
from llmc.onnx_folder import GENAI, MODEL

QDQ_LEVEL = "session.qdq_matmulnbits_accuracy_level"
DATA_FOLDER = "session.model_external_initializers_file_folder_path"  # of a model that is given as bytes
STEPS, REPEATS = 8, 3  # tokens decoded in a measurement, and how often it is made
ENOUGH = 3.0  # seconds after which no more is measured: at level 0 ONNX Runtime may take seconds for a token (lint.py)
# What level 4 may do to the text of the check. A 4-bit grid itself loses 0.1 or more and keeps 70 to 80 % of the top tokens;
# llama.cpp rounds activations alike, always. On SmolLM2-135M level 4 cost 0.0045 and kept 94 %; where a kernel goes wrong
# (onnxruntime#29849) it is far more
MOST_KLD, LEAST_TOP1 = 0.01, 0.9
LEAST_GAIN = 1.05  # geometric mean of what prefill and decoding gain


def set_level(folder: Path, level: int) -> int:
    """Write the level into every MatMulNBits of model.onnx; returns how many there are."""
    path = folder / MODEL
    model = onnx.load(path, load_external_data=False)
    found = [a for n in model.graph.node if n.op_type == "MatMulNBits" for a in n.attribute if a.name == "accuracy_level"]
    for attribute in found:
        attribute.i = level
    if found:
        temporary = path.with_name(f".{MODEL}.partial")
        temporary.write_bytes(model.SerializeToString())
        os.replace(temporary, path)
    return len(found)


def has_codes(folder: Path) -> bool:
    """Whether the level has anything to say: quantised matrices of either form."""
    kinds = {n.op_type for n in onnx.load(folder / MODEL, load_external_data=False).graph.node}
    return bool(kinds & {"MatMulNBits", "DequantizeLinear"})


class Session:
    """model.onnx on the CPU, with a cache that is passed from call to call. watched: values inside of the graph, float32,
    for `values`."""

    def __init__(self, folder: Path, threads: int, level: int, watched: tuple[str, ...] = ()) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.add_session_config_entry(QDQ_LEVEL, str(level))
        model: Path | bytes = folder / MODEL
        if watched:
            proto = onnx.load(folder / MODEL, load_external_data=False)
            proto.graph.output.extend(onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in watched)
            model = proto.SerializeToString()
            options.add_session_config_entry(DATA_FOLDER, str(folder))
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.past = [i for i in self.session.get_inputs() if i.name.startswith("past_key_values.")]
        genai = folder / GENAI  # the builder leaves the width of the cache open in the graph
        self.head_size = int(json.loads(genai.read_text(encoding="utf-8"))["model"]["decoder"]["head_size"]
                             if genai.is_file() else self.past[0].shape[3])
        self.others = {i.name for i in self.session.get_inputs()} - {i.name for i in self.past}
        self.present = [i.name.replace("past_key_values.", "present.") for i in self.past]

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """int [n] from an empty cache -> float32 [n, vocab]."""
        return self._run(ids, self._empty(), 0, ["logits"])[0][0]

    def values(self, ids: np.ndarray, watched: tuple[str, ...]) -> dict[str, np.ndarray]:
        """int [n] from an empty cache -> float32 [n, ..] for each name."""
        return {name: v[0] for name, v in zip(watched, self._run(ids, self._empty(), 0, list(watched)), strict=True)}

    def _empty(self) -> list[np.ndarray]:
        return [np.zeros((1, int(i.shape[1]), 0, self.head_size), np.float32) for i in self.past]

    def _run(self, ids: np.ndarray, past: list[np.ndarray], used: int, outputs: list[str]) -> list[np.ndarray]:
        feed = {"input_ids": np.asarray(ids, np.int64)[None], "attention_mask": np.ones((1, used + len(ids)), np.int64),
                "position_ids": np.arange(used, used + len(ids))[None]}
        feed = {name: value for name, value in feed.items() if name in self.others}
        feed |= {i.name: p for i, p in zip(self.past, past, strict=True)}
        return self.session.run(outputs, feed)

    def generate(self, ids: np.ndarray, count: int) -> tuple[list[int], np.ndarray]:
        """Greedy, a token a run on the cache of the last: `count` ids, and the logits [count, vocab] that gave them."""
        step, past, used, rows = ids, self._empty(), 0, list[np.ndarray]()
        for _ in range(count):
            logits, *past = self._run(step, past, used, ["logits", *self.present])
            used += len(step)
            rows.append(logits[0, -1])
            step = np.array([rows[-1].argmax()])
        return [int(row.argmax()) for row in rows], np.stack(rows)

    def seconds(self, ids: np.ndarray) -> tuple[float, float]:
        """Least time of a prefill of `ids` and of a decoded token after it, over a few repeats."""
        prefill, decode = list[float](), list[float]()
        begun = time.perf_counter()
        while not decode or (len(prefill) <= REPEATS and time.perf_counter() - begun < ENOUGH):
            start = time.perf_counter()
            logits, *past = self._run(ids, self._empty(), 0, ["logits", *self.present])
            prefill.append(time.perf_counter() - start)
            for i in range(STEPS):
                token = logits[0, -1].argmax(keepdims=True)
                start = time.perf_counter()
                logits, *past = self._run(token, past, len(ids) + i, ["logits", *self.present])
                decode.append(time.perf_counter() - start)
                if start - begun > ENOUGH:
                    break
        return min(prefill), min(decode)


@dataclass(frozen=True)
class Levels:
    """Level 4 against level 0 on the text of the check. Speeds in tokens per second."""

    tokens: int
    kld: float
    top1_agreement: float
    prefill_0: float
    prefill_4: float
    decode_0: float
    decode_4: float

    @property
    def gain(self) -> str:
        """What level 4 gains."""
        return (f"prefill {self.prefill_4:.0f} against {self.prefill_0:.0f} tokens/s, decoding {self.decode_4:.1f} "
                f"against {self.decode_0:.1f}")

    def choose(self) -> tuple[int, str]:
        """The level, and why."""
        lost = (f"a KL divergence of {self.kld:.2g} and {self.top1_agreement:.1%} of the top tokens kept over {self.tokens} "
                "tokens")
        if not (self.kld <= MOST_KLD and self.top1_agreement >= LEAST_TOP1):  # NaN must not pass
            return 0, f"level 4 loses too much: {lost} (at most {MOST_KLD} and at least {LEAST_TOP1:.0%}); {self.gain}"
        if (self.prefill_4 / self.prefill_0 * self.decode_4 / self.decode_0) ** 0.5 < LEAST_GAIN:
            return 0, f"level 4 is not faster here: {self.gain}"
        return 4, f"level 4 is faster and loses little: {self.gain}; {lost}"

    def __str__(self) -> str:
        return (f"level 4 against level 0: {self.gain}; a KL divergence of {self.kld:.2g}, {self.top1_agreement:.1%} of "
                "the top tokens kept")


def measure(folder: Path, ids: np.ndarray, threads: int) -> Levels:
    """Both levels, one session at a time. Leaves the file at level 4."""
    found: dict[int, Any] = {}
    for level in (0, 4):
        set_level(folder, level)
        session = Session(folder, threads, level)
        found[level] = session.logits(ids), *session.seconds(ids)
        del session
    _, kld, top1 = compare_logits(found[0][0], found[4][0])
    return Levels(len(ids), kld, top1, len(ids) / found[0][1], len(ids) / found[4][1], 1 / found[0][2], 1 / found[4][2])


def as_dict(levels: Levels | None) -> dict[str, Any] | None:
    return None if levels is None else asdict(levels)
