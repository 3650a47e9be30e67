"""The lint: each rule finds what it is for, in graphs made here, and keeps still about the safe envelope."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnx")
from onnx import TensorProto, helper, save

from llmc.formats.onnx_lint import as_notes, lint

SAFE = {"K": 64, "N": 8, "bits": 4, "block_size": 32, "accuracy_level": 0}


def tensor(name: str, location: str = "model.onnx.data", kind: int = TensorProto.UINT8) -> TensorProto:
    t = TensorProto(name=name, data_type=kind, dims=[8, 2, 16], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "256")):
        t.external_data.add(key=key, value=value)
    return t


def rules(folder: Path, nodes: list[Any], tensors: list[TensorProto] | None = None,
          kind: int = TensorProto.FLOAT) -> set[str]:
    """Names of the rules that find something in a graph; its file is written without its weights."""
    x, y = (helper.make_tensor_value_info(n, kind, [1, 64]) for n in ("x", "y"))
    opsets = [helper.make_opsetid("", 22), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "g", [x], [y], tensors or [tensor("B")])
    save(helper.make_model(graph, opset_imports=opsets), folder / "model.onnx")
    found = lint(folder / "model.onnx")
    assert len(as_notes(found)) == len(found)
    return {f.rule for f in found}


def nbits(inputs: tuple[str, ...] = ("x", "B", "s"), **changed: int) -> Any:
    return helper.make_node("MatMulNBits", inputs, ["y"], "mm", domain="com.microsoft", **{**SAFE, **changed})


ALWAYS = {"contrib-qnn"}  # MatMulNBits itself is no standard operator


def test_the_safe_envelope_is_quiet(tmp_path: Path) -> None:
    assert rules(tmp_path, [nbits()]) == ALWAYS
    assert rules(tmp_path, [helper.make_node("MatMul", ["x", "B"], ["y"], "mm")]) == set()


@pytest.mark.parametrize(("node", "rule"), [
    (nbits(block_size=128), "block-size"), (nbits(block_size=256), "large-blocks"), (nbits(K=72), "ragged-rows"),
    (nbits(("x", "B", "s", "z")), "asymmetric"), (nbits(("x", "B", "s", "", "g")), "g-idx"), (nbits(bits=2), "few-bits"),
    (nbits(accuracy_level=4), "level-4"), (nbits(bits=8), "unpacked-8-bit"),
    (nbits(bits=8, accuracy_level=1), "unpacked-8-bit"),
    (helper.make_node("GatherBlockQuantized", ["B", "x", "s"], ["y"], "g", domain="com.microsoft"), "contrib-directml"),
])
def test_each_rule_on_matrices(node: Any, rule: str, tmp_path: Path) -> None:
    assert rule in rules(tmp_path, [node])
    assert rule not in rules(tmp_path, [nbits()])


def test_8_bits_are_unpacked_below_level_4_only(tmp_path: Path) -> None:
    assert rules(tmp_path, [nbits(bits=8, accuracy_level=4)]) == ALWAYS | {"level-4"}


def test_a_block_of_32_is_the_default_of_no_rule(tmp_path: Path) -> None:
    assert rules(tmp_path, [nbits(("x", "B", "s", "", ""))]) == ALWAYS, "an empty name is an absent input"


@pytest.mark.parametrize("location", ["/home/somebody/model.onnx.data", "C:\\models\\model.onnx.data", "../model.onnx.data"])
def test_data_that_lies_elsewhere(location: str, tmp_path: Path) -> None:
    assert "absolute-data" in rules(tmp_path, [nbits()], [tensor("B", location)])


def test_float16(tmp_path: Path) -> None:
    assert "fp16-compute" in rules(tmp_path, [nbits()], kind=TensorProto.FLOAT16)
    cast = helper.make_node("Cast", ["B"], ["y"], "c", to=TensorProto.FLOAT)
    assert "fp16-weights" in rules(tmp_path, [cast], [tensor("B", kind=TensorProto.FLOAT16)])


def test_standard_operators_are_dequantized_at_load(tmp_path: Path) -> None:
    assert rules(tmp_path, [helper.make_node("DequantizeLinear", ["B", "s"], ["y"], "d", axis=0, block_size=32)]) == {
        "dequantized-at-load"}


@pytest.mark.parametrize(("kind", "found"), [(TensorProto.INT8, True), (TensorProto.UINT8, False)])
def test_products_that_saturate_are_those_of_signed_weights(kind: int, found: bool, tmp_path: Path) -> None:
    node = helper.make_node("MatMulInteger", ["x", "B"], ["y"], "mm")
    assert ("saturation" in rules(tmp_path, [node], [tensor("B", kind=kind)])) == found
