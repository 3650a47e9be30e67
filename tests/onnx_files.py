"""ONNX folders for tests: llmc's own export, the builder's conversion, a decoder by hand, and logits by onnxruntime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
from onnx import TensorProto, helper, numpy_helper
from onnxruntime_genai.models.builder import create_model, parse_extra_options

from llmc.export.onnx import OnnxExportConfig, export_onnx

# largest relative error of the logits at accuracy level 0, both sides in float32
FLOAT_NOISE = 1e-5


def saturates() -> bool:
    """Whether this CPU adds pairs of uint8 times int8 products in 16 bits (onnxruntime#6004), as x86 without VNNI does."""
    tensors = [helper.make_tensor_value_info("x", TensorProto.UINT8, [1, 64]),
               helper.make_tensor_value_info("y", TensorProto.INT32, [1, 16])]
    weights = numpy_helper.from_array(np.full((64, 16), 127, np.int8), "w")
    node = helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "g", tensors[:1], tensors[1:], [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return int(np.asarray(session.run(None, {"x": np.full((1, 64), 255, np.uint8)})[0])[0, 0]) != 64 * 255 * 127


exact_int8 = pytest.mark.skipif(saturates(), reason="int8 products saturate on this CPU, so that w8a8 is refused on it")


def export(folder: Path, **options: Any) -> dict[str, Any]:
    out = options.pop("out", folder.with_name(f"{folder.name}-onnx"))
    return export_onnx(OnnxExportConfig(model=folder, out=out, threads=1, **{"accuracy_level": "0", **options}))


def onnx_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    """[n, vocab] by onnxruntime alone."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    head = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]["head_size"]
    feed = {"input_ids": ids[None].astype(np.int64), "attention_mask": np.ones((1, len(ids)), np.int64)}
    feed |= {i.name: np.zeros((1, i.shape[1], 0, head), np.float32) for i in session.get_inputs() if "past" in i.name}
    return np.asarray(session.run(["logits"], feed)[0][0])


IDS = np.arange(3, 103, dtype=np.int32) * 11 % tiny.VOCAB
NOISE = {"rtol": 1e-4, "atol": 1e-4}


def convert(folder: Path, out: Path, precision: str = "fp32") -> Path:
    """What `python -m onnxruntime_genai.models.builder -m FOLDER -o OUT -p PRECISION -e cpu` does."""
    options = parse_extra_options("", str(folder), str(out), precision, "cpu", str(out), [])
    create_model("", str(folder), str(out), precision, "cpu", str(out), **options)
    return out


def plain_decoder(folder: Path) -> np.ndarray:
    """A decoder of standard operators that takes position_ids: its logits are the running sum of its embedding's rows plus
    the position. Returns the embedding [tiny.VOCAB, 8 -> vocabulary 8]."""
    folder.mkdir()
    table = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    constants = {"table": table, "heads": np.array([1]), "minus": np.array([-1]), "zero": np.array([0]), "axis": np.array(2),
                 "past_end": np.array([1 << 30]), "two": np.array([2]), "one": np.array([1])}
    node = helper.make_node
    nodes = [
        node("Gather", ["table", "input_ids"], ["x"]),
        node("Unsqueeze", ["x", "heads"], ["new"]),
        node("Concat", ["past_key_values.0.key", "new"], ["present.0.key"], axis=2),
        node("Concat", ["past_key_values.0.value", "new"], ["present.0.value"], axis=2),
        node("CumSum", ["present.0.value", "axis"], ["sums"]),
        node("Shape", ["input_ids"], ["length"], start=1),
        node("Mul", ["length", "minus"], ["from"]),
        node("Slice", ["sums", "from", "past_end", "two"], ["last"]),
        node("Squeeze", ["last", "one"], ["scores"]),
        node("Cast", ["position_ids"], ["position"], to=TensorProto.FLOAT),
        node("Unsqueeze", ["position", "two"], ["column"]),
        node("Add", ["scores", "column"], ["logits"]),
    ]
    ids = [helper.make_tensor_value_info(n, TensorProto.INT64, [1, "n"]) for n in ("input_ids", "position_ids")]
    mask = helper.make_tensor_value_info("attention_mask", TensorProto.INT64, [1, "total"])
    past, present = ([helper.make_tensor_value_info(f"{side}.0.{kv}", TensorProto.FLOAT, [1, 1, f"{side}_n", 8])
                      for kv in ("key", "value")] for side in ("past_key_values", "present"))
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, "n", 8])
    graph = helper.make_graph(nodes, "plain", [*ids, mask, *past], [logits, *present],
                              [numpy_helper.from_array(v, k) for k, v in constants.items()])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), str(folder / "model.onnx"))
    return table
