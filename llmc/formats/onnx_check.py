"""What llmc and ONNX Runtime's kernels take for granted in a graph. A kernel trusts the attributes of its node: with other
sizes than those of its weights it reads past their end, and the process dies. Only the graph is read, no weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.errors import UserError
from llmc.formats.genai_config import AGAIN, LEVEL
from llmc.formats.onnx_proto import attributes, elements, packed_bits

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

# Operators that llmc reads: the least number of their inputs
INPUTS = {"MatMulNBits": 3, "GatherBlockQuantized": 3, "DequantizeLinear": 2, "MatMulInteger": 2, "MatMul": 2, "Gemm": 2,
          "Gather": 2, "Cast": 1, "Mul": 2, "GroupQueryAttention": 7, "QMoE": 5, "MoE": 3}
# Whole numbers among the attributes of quantized matrices and attention: {name: (least, most)}
NUMBERS = {"K": (1, 1 << 31), "N": (1, 1 << 31), "bits": (2, 8), "block_size": (0, 1 << 20), LEVEL: (0, 4), "k": (1, 1 << 16),
           "expert_weight_bits": (2, 8), "num_heads": (1, 1 << 16), "kv_num_heads": (1, 1 << 16),
           "local_window_size": (-1, 1 << 31), "sliding_window_cache": (0, 1)}
OWN = "com.microsoft"  # the domain of these attributes
REQUIRED = {"MatMulNBits": ("K", "N", "block_size"), "GroupQueryAttention": ("num_heads", "kv_num_heads")}


def check_graph(file: Path, proto: ModelProto) -> None:
    """Raise UserError for the first fault of a graph."""
    if (found := next(faults(proto), None)) is not None:
        raise UserError(f"{file} is damaged: {found}", AGAIN)


def faults(proto: ModelProto) -> Iterator[str]:
    """What is wrong with a graph, one line each."""
    sizes: dict[str, TensorProto] = {}
    for tensor in proto.graph.initializer:
        if tensor.name in sizes:
            yield f"it has two tensors named {tensor.name!r:.100}"
        sizes[tensor.name] = tensor
        yield from _of_tensor(tensor)
    written: set[str] = set()
    for node in proto.graph.node:
        where = f"{node.op_type or 'a node without type'} {node.name!r:.100}"
        yield from (f"{where} {fault}" for fault in _of_node(node, sizes))
        for out in node.output:
            if out and out in written:
                yield f"{where} writes {out!r:.100}, which another node writes too"
            written.add(out)


def _of_tensor(tensor: TensorProto) -> Iterator[str]:
    from onnx import TensorProto

    name = f"the tensor {tensor.name!r:.100}"
    if tensor.data_type not in TensorProto.DataType.values() or tensor.data_type == TensorProto.UNDEFINED:
        yield f"{name} has the type {tensor.data_type}, which ONNX does not have"
    elif any(d < 0 for d in tensor.dims) or math.prod(tensor.dims) >= 1 << 48:
        yield f"{name} has the shape {list(tensor.dims)}"
    elif tensor.raw_data and tensor.data_type != TensorProto.STRING and 8 * len(tensor.raw_data) != packed_bits(tensor):
        yield (f"{name} has {len(tensor.raw_data):,} bytes, and its shape {list(tensor.dims)} needs "
               f"{packed_bits(tensor) // 8:,}")


def _of_node(node: NodeProto, sizes: dict[str, Any]) -> Iterator[str]:
    if not node.op_type or not any(node.output):
        yield "has no type or no output"
        return
    if len(node.input) < INPUTS.get(node.op_type, 0):
        yield f"has {len(node.input)} inputs, and needs {INPUTS[node.op_type]}"
        return
    try:
        values = attributes(node)
    except (ValueError, TypeError, RuntimeError) as e:
        yield f"has an attribute that cannot be read: {e}"
        return
    if node.domain != OWN:
        return
    for key, (least, most) in NUMBERS.items():
        least = 0 if node.op_type == "RotaryEmbedding" else least  # there 0 heads means: found from the shape
        value = values.get(key, None if key in REQUIRED.get(node.op_type, ()) else least)
        if not isinstance(value, int) or not least <= value <= most:
            yield f"has {key} = {value!r:.40}, not a whole number from {least} to {most}"
            return
    if node.op_type == "MatMulNBits":
        yield from _of_matrix(node, values, sizes)


def _of_matrix(node: NodeProto, a: dict[str, Any], sizes: dict[str, Any]) -> Iterator[str]:
    """A matrix [N, K] of codes in blocks of rows: its weights must have as many elements as its attributes say."""

    bits, block = a.get("bits", 4), a["block_size"]
    if block < 16 or block & (block - 1) or bits not in (2, 4, 8):
        yield f"has blocks of {block} codes of {bits} bits, which ONNX Runtime does not have"
        return
    blocks = a["N"] * -(-a["K"] // block)
    for name, wanted, what in ((node.input[1], blocks * block * bits // 8, "codes"), (node.input[2], blocks, "scales")):
        if name in sizes and elements(sizes[name]) != wanted:
            yield (f"has {elements(sizes[name]):,} {what}, and K = {a['K']}, N = {a['N']} with blocks of {block} need "
                   f"{wanted:,}")
