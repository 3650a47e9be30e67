"""The weights of an ONNX folder: a quantized matrix with its scales is one weight."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from llmc.families.names import classify
from llmc.formats.experts import share, share_of_config, used_of
from llmc.formats.onnx_folder import OnnxFolder
from llmc.formats.onnx_proto import attributes, elements
from llmc.formats.tensors import Tensor

ROW_READERS = ("Gather", "GatherBlockQuantized")  # operators that read rows of their first input
# QMoE (com.microsoft, docs/ContribOperators.md of ONNX Runtime): inputs (codes, scales, zero points) of its three products
QMOE = ((2, 3, 11), (5, 6, 12), (8, 9, 13))


def tensors(source: OnnxFolder) -> Iterator[Tensor]:
    """Every weight, in the graph's order. A matrix that is both embedding and head counts as embedding."""
    chosen = _chosen(source)
    by_config = share_of_config(source.config | source.config.get("text_config", {}))
    for initializer, tensor in _stored(source):
        yield replace(tensor, used=chosen.get(initializer) or used_of(tensor.name, by_config))


def _chosen(source: OnnxFolder) -> dict[str, float]:
    """{initializer: share of the experts that a token uses} of the inputs of the operators MoE and QMoE."""
    sizes = {t.name: t for t in source.proto.graph.initializer}
    return {name: share(int(sizes[name].dims[0]), attributes(node).get("k", 1))
            for node in source.proto.graph.node if node.op_type in ("MoE", "QMoE")
            for name in node.input[2:] if name in sizes and sizes[name].dims}


def _stored(source: OnnxFolder) -> Iterator[tuple[str, Tensor]]:
    """(name of its initializer, the weight) of every weight."""
    from onnx import TensorProto

    packed = _packed(source)
    embeddings = _embeddings(source)
    parts = {name for _, _, _, names in packed.values() for name in names}
    for tensor in source.proto.graph.initializer:
        name = tensor.name
        if name in packed:
            label, kind, parameters, names = packed[name]
            nbytes = sum(source.spans[n].length for n in names)
            yield name, Tensor(label, "embedding" if name in embeddings else classify(label), kind, parameters, nbytes)
        elif name not in parts:
            kind = TensorProto.DataType.Name(tensor.data_type).replace("FLOAT", "F32" if tensor.data_type == 1 else "F")
            yield name, Tensor(name, "embedding" if name in embeddings else classify(name), kind, elements(tensor),
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
        if node.op_type == "QMoE":
            found |= dict(_experts(node, sizes))
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


def _experts(node: Any, sizes: dict[str, Any]) -> Iterator[tuple[str, tuple[str, str, int, list[str]]]]:
    """The items of `_packed` for one QMoE: each of its matrices holds all experts, [experts, out, bytes of a row]."""
    a = attributes(node)
    bits = a.get("expert_weight_bits", 4)
    block = f" block {a['block_size']}" if a.get("block_size") else ""
    for places in QMOE:
        names = [n for i in places if i < len(node.input) and (n := node.input[i]) in sizes]
        if names and names[0] == node.input[places[0]]:
            kind = f"int{bits}{block}" + (" asym" if len(names) > 2 else "")
            yield names[0], (names[0], kind, elements(sizes[names[0]]) * (8 // bits), names)


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
