"""Small readers of ONNX's messages: a node's attributes, a tensor's place and size."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto


def external(tensor: TensorProto) -> dict[str, str]:
    """The reference to a tensor's external data: {'location', 'offset', 'length'}; {} if its bytes are in the graph."""
    return {e.key: e.value for e in tensor.external_data}


def bits_of(data_type: int) -> int:
    """Bits that one value of an onnx.TensorProto data type takes in external data."""
    from onnx import TensorProto, helper

    if match := re.fullmatch(r"U?INT([24])|FLOAT(4)E2M1", TensorProto.DataType.Name(data_type)):
        return int(match[1] or match[2])
    return int(helper.tensor_dtype_to_np_dtype(data_type).itemsize) * 8


def packed_bits(tensor: TensorProto) -> int:
    """Bits of a tensor in external data, a whole number of bytes."""
    return -(-elements(tensor) * bits_of(tensor.data_type) // 8) * 8


def elements(tensor: TensorProto) -> int:
    """The number of values of a tensor."""
    n = 1
    for d in tensor.dims:
        n *= d
    return n


def attributes(node: NodeProto) -> dict[str, Any]:
    """A node's attributes by name."""
    from onnx import helper

    return {a.name: helper.get_attribute_value(a) for a in node.attribute}
