"""Rules that find what is slow, wrong or unsupported on some devices in an .onnx file. Most rules cite their source.

It reads any decoder's model.onnx, from any exporter, without its weights. A finding is a note and not an error: the file is
correct on the devices that it is made for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from llmc.formats.genai_config import LEVEL
from llmc.formats.onnx_folder import leaves_folder, read_graph
from llmc.formats.onnx_proto import attributes, external

FLOAT16 = onnx.TensorProto.FLOAT16
STANDARD = ("", "ai.onnx")
DIRECTML_OWN = {  # contrib operators with a kernel in DirectML (docs/OperatorKernels.md of ONNX Runtime)
    "GroupQueryAttention", "MatMulNBits", "MultiHeadAttention", "RotaryEmbedding", "SkipSimplifiedLayerNormalization",
    "SimplifiedLayerNormalization", "SkipLayerNormalization", "QuickGelu", "FastGelu", "BiasGelu", "DequantizeLinear",
}


@dataclass(frozen=True)
class Finding:
    """A rule that a file breaks.

    device: the devices, or the execution provider, that it affects. count: number of nodes or tensors. first: one's name."""

    rule: str
    device: str
    what: str
    count: int
    first: str


def lint(path: Path) -> list[Finding]:
    """The findings in the model.onnx at `path`."""
    model = read_graph(path)
    found: list[Finding] = []
    for rule, device, what, names in _rules():
        hits = list(names(model))
        if hits:
            found.append(Finding(rule, device, what, len(hits), hits[0]))
    return found


def as_notes(findings: list[Finding]) -> list[str]:
    """The findings as text, one line each."""
    return [f"{f.device}: {f.what} ({f.count}, first {f.first})" for f in findings]


Names = Callable[[Any], Iterator[str]]


def _rules() -> Iterator[tuple[str, str, str, Names]]:
    """Yield (rule, device, description, function that yields the names of nodes or tensors that break the rule)."""
    nbits = "MatMulNBits"
    yield ("block-size", "ARM", "KleidiAI's int4 kernels and tract need blocks of 32 (onnxruntime#27751)",
           lambda m: (name for name, a in _matrices(m) if a["block_size"] != 32))
    yield ("large-blocks", "all", "blocks of 256 and more are slow or wrong in some versions (onnxruntime#23004, #28551)",
           lambda m: (name for name, a in _matrices(m) if a["block_size"] >= 256))
    yield ("ragged-rows", "ARM", "KleidiAI needs rows of whole blocks (onnxruntime#27751)",
           lambda m: (name for name, a in _matrices(m) if a["K"] % max(1, a["block_size"])))
    yield ("asymmetric", "ARM", "KleidiAI supports zero points only since March 2026, tract does not (onnxruntime#27751)",
           lambda m: (n.name for n in _nodes(m, nbits) if _input(n, 3)))
    yield ("g-idx", "GPU", "WebGPU's kernels ignore g_idx, and it will be removed (onnxruntime#24509)",
           lambda m: (n.name for n in _nodes(m, nbits) if _input(n, 4)))
    yield ("few-bits", "all", "2 bits with float zero points are about 20 times slower (onnxruntime#28552)",
           lambda m: (name for name, a in _matrices(m) if a["bits"] < 4))
    yield ("unpacked-8-bit", "CPU", "8-bit matrices have a kernel at accuracy_level 4 only (MatMulNBits' ComputeBUnpacked): "
           "at lower levels they are unpacked to float32 for every token, and decoding is many times slower; "
           "--head-accuracy-level 4, or --head-bits 16 or 4, avoids it for the head",
           lambda m: (name for name, a in _matrices(m) if a["bits"] == 8 and a[LEVEL] != 4))
    yield ("level-4", "all", "int8 activations (accuracy_level 4) change the top token of some models (onnxruntime#29849)",
           lambda m: (name for name, a in _matrices(m) if a[LEVEL] == 4))
    yield ("saturation", "CPU", "x86 without VNNI adds pairs of uint8 times int8 products in 16 bits, which saturate: "
           "results are wrong without a message (onnxruntime#6004)", lambda m: (n.name for n in _signed_products(m)))
    yield ("contrib-qnn", "NPU", "QNN and other NPUs support standard operators only (Olive#1403)",
           lambda m: (f"{n.domain}.{n.op_type}" for n in m.graph.node if n.domain not in STANDARD))
    yield ("contrib-directml", "DirectML", "operators without a DirectML kernel run on the CPU",
           lambda m: (n.op_type for n in m.graph.node if n.domain not in STANDARD and n.op_type not in DIRECTML_OWN))
    yield ("fp16-compute", "CPU", "float16 inputs are computed in float32 between casts, or not at all",
           lambda m: (i.name for i in m.graph.input if i.type.tensor_type.elem_type == FLOAT16))
    yield ("fp16-weights", "CPU", "float16 weights become float32 when the file is loaded: they save disk but no memory",
           lambda m: _cast_weights(m))
    yield ("dequantized-at-load", "all", "DequantizeLinear is fused with MatMul when the file is loaded, which takes time "
           "and memory (onnxruntime#21362)", lambda m: (n.name for n in _nodes(m, "DequantizeLinear")))
    yield ("absolute-data", "all", "external data lies outside of the model's folder",
           lambda m: (t.name for t in m.graph.initializer if leaves_folder(external(t).get("location", ""))))
    yield ("one-protobuf", "all", "weights of 2 GB and more must lie outside of the .onnx file (onnxruntime#4707)",
           lambda m: ("weights" for _ in range(sum(t.ByteSize() for t in m.graph.initializer) >= 2**31 - 1)))


def _nodes(model: Any, kind: str) -> Iterator[Any]:
    return (n for n in model.graph.node if n.op_type == kind)


def _matrices(model: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and attributes of every MatMulNBits."""
    return ((n.name, {"bits": 4, "block_size": 0, "K": 0, LEVEL: 0, **attributes(n)}) for n in _nodes(model, "MatMulNBits"))


def _signed_products(model: Any) -> Iterator[Any]:
    int8 = {t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8}
    return (n for n in _nodes(model, "MatMulInteger") if n.input[1] in int8)


def _input(node: Any, i: int) -> bool:
    return len(node.input) > i and bool(node.input[i])


def _cast_weights(model: Any) -> Iterator[str]:
    half = {t.name for t in model.graph.initializer if t.data_type == FLOAT16}
    return (n.input[0] for n in _nodes(model, "Cast") if n.input[0] in half)
