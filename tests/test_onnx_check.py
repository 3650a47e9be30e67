"""Graphs whose nodes and weights do not fit are refused before a kernel of ONNX Runtime reads past the end of a weight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from llmc.errors import UserError
from llmc.formats.onnx_check import faults
from llmc.formats.onnx_folder import open_onnx


def matrix(model: Any) -> Any:
    return next(n for n in model.graph.node if n.op_type == "MatMulNBits")


def attribute(node: Any, name: str) -> Any:
    return next(a for a in node.attribute if a.name == name)


def number(name: str, value: int) -> Callable[[Any], Any]:
    return lambda m: setattr(attribute(matrix(m), name), "i", value)


def test_the_graphs_of_llmc_and_of_the_builder_have_no_faults(exported: SimpleNamespace, converted: SimpleNamespace) -> None:
    for folder in (exported.out, converted.fp32, converted.int4):
        assert list(faults(open_onnx(folder).proto)) == []


@pytest.mark.parametrize(("change", "problem"), [
    (number("K", 1 << 20), "scales|codes"), (number("N", -1), "N = -1"), (number("block_size", 48), "blocks of 48"),
    (number("block_size", 128), "codes"), (number("bits", 3), "codes of 3 bits"), (number("accuracy_level", 9), "level = 9"),
    (lambda m: matrix(m).attribute.remove(attribute(matrix(m), "K")), "K = None"),
    (lambda m: matrix(m).input.pop(), "has 2 inputs"), (lambda m: matrix(m).ClearField("output"), "no type or no output"),
    (lambda m: setattr(attribute(matrix(m), "K"), "type", onnx.AttributeProto.STRING), "K = b"),
    (lambda m: m.graph.initializer[0].dims.append(-3), "has the shape"),
    (lambda m: setattr(m.graph.initializer[0], "data_type", 99), "the type 99"),
    (lambda m: m.graph.initializer.append(m.graph.initializer[0]), "two tensors"),
    (lambda m: m.graph.node.append(m.graph.node[0]), "which another node writes too"),
    (lambda m: m.graph.ClearField("node"), "holds no graph"),
])
def test_a_damaged_graph(exported: SimpleNamespace, tmp_path: Path, change: Callable[[Any], Any], problem: str) -> None:
    folder = tmp_path / "o"
    folder.mkdir()
    for file in exported.out.iterdir():
        (folder / file.name).symlink_to(file)
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    while len(matrix(model).input) > 3:
        matrix(model).input.pop()
    change(model)
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=problem):
        open_onnx(folder)
