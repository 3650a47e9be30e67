"""The weights of an ONNX folder: a quantized matrix with its scales is one weight."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from llmc.families.names import classify
from llmc.formats.onnx_folder import OnnxFolder, attributes, elements
from llmc.formats.tensors import Tensor

ROW_READERS = ("Gather", "GatherBlockQuantized")  # operators that read rows of their first input


def tensors(source: OnnxFolder) -> Iterator[Tensor]:
    """Every weight, in the graph's order. A matrix that is both embedding and head counts as embedding."""
    from onnx import TensorProto

    packed = _packed(source)
    embeddings = _embeddings(source)
    parts = {name for _, _, _, names in packed.values() for name in names}
    for tensor in source.proto.graph.initializer:
        name = tensor.name
        if name in packed:
            label, kind, parameters, names = packed[name]
            nbytes = sum(source.spans[n].length for n in names)
            yield Tensor(label, "embedding" if name in embeddings else classify(label), kind, parameters, nbytes)
        elif name not in parts:
            kind = TensorProto.DataType.Name(tensor.data_type).replace("FLOAT", "F32" if tensor.data_type == 1 else "F")
            yield Tensor(name, "embedding" if name in embeddings else classify(name), kind, elements(tensor),
                         source.spans[name].length)


def _packed(source: OnnxFolder) -> dict[str, tuple[str, str, int, list[str]]]:
    """{initializer with codes: (label, type, parameters, all its initializers)} of quantized matrices."""
    from onnx import TensorProto

    sizes = {t.name: t for t in source.proto.graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in source.proto.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found: dict[str, tuple[str, str, int, list[str]]] = {}
    for node in source.proto.graph.node:
        at = {"MatMulNBits": 1, "MatMulInteger": 1, "GatherBlockQuantized": 0, "DequantizeLinear": 0}.get(node.op_type)
        if at is None or node.input[at] not in sizes:
            continue
        codes, a = sizes[node.input[at]], attributes(node)
        if node.op_type == "MatMulInteger":  # its inputs are quantized too; the scales follow the product
            after = [*node.input[3:4], *_factors(node, readers)]
        else:
            after = node.input[at + 1 : at + 3] if node.op_type != "GatherBlockQuantized" else node.input[2:4]
        names = [codes.name, *(n for n in after if n in sizes)]
        if node.op_type == "DequantizeLinear":
            block = f" block {a['block_size']}" if a.get("block_size") else ""
            kind, parameters = f"{TensorProto.DataType.Name(codes.data_type).lower()}{block} QDQ", elements(codes)
        elif node.op_type == "MatMulInteger":
            rows = " rows" if any(elements(sizes[n]) > 1 for n in names[1:]) else ""
            kind, parameters = f"{TensorProto.DataType.Name(codes.data_type).lower()}{rows} W8A8", elements(codes)
        else:
            bits = a.get("bits", 4)
            kind = f"int{bits} block {a['block_size']}" + (" asym" if len(names) > 2 else "")
            packed_in_bytes = codes.data_type == TensorProto.UINT8
            parameters = a["N"] * a["K"] if at else elements(codes) * (8 // bits if packed_in_bytes else 1)
        label = re.sub(r"[._]?q?weight.*$", "", codes.name) + ".weight"  # exporters name codes weight_Q4, qweight, …
        known = found.setdefault(codes.name, (label, kind, parameters, []))[3]
        known += [n for n in names if n not in known]  # two nodes use a tied embedding
    return found


def _factors(node: Any, readers: dict[str, list[Any]]) -> list[str]:
    """Names of the factors that an integer product is multiplied by to give floats."""
    names: list[str] = []
    while len(after := readers.get(node.output[0], [])) == 1 and after[0].op_type in ("Cast", "Mul"):
        names += [n for n in after[0].input if n != node.output[0]]
        node = after[0]
    return names


def _embeddings(source: OnnxFolder) -> set[str]:
    """Names of the initializers whose rows token ids select, directly or through other nodes."""
    nodes = source.proto.graph.node
    writer = {out: n for n in nodes for out in n.output}
    found: set[str] = set()
    for node in nodes:
        if node.op_type in ROW_READERS and node.input[1] == "input_ids":
            todo = [node.input[0]]
            while todo:
                name = todo.pop()
                if name in writer:
                    todo += writer[name].input
                elif name in source.spans:
                    found.add(name)
    return found
