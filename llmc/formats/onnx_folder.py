"""A folder that ONNX Runtime can run: a graph (model.onnx), the weights that it keeps in files beside it, and the JSON that
describes it (genai_config.json of onnxruntime-genai, or the config.json of other exporters). llmc's own or anybody's.

Opening one reads the graph and no weights, and refuses whatever names a file outside the folder.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from llmc.errors import UserError
from llmc.small_files import read_json_object

if TYPE_CHECKING:
    import numpy as np
    from onnx import ModelProto, NodeProto, TensorProto

GENAI = "genai_config.json"
MODEL = "model.onnx"
INSTALL = "pip install 'llmc-toolkit[onnx]'"
AGAIN = "copy the whole folder again, or export it again"
# What the inputs of a quantized matrix are rounded to before the product: 0 nothing, 4 int8 in blocks. A MatMulNBits says it
# itself; for DequantizeLinear and MatMul, which ONNX Runtime fuses, it is an option of the session, 4 where it is left out
LEVEL, QDQ_LEVEL, QDQ_DEFAULT = "accuracy_level", "session.qdq_matmulnbits_accuracy_level", 4


def is_onnx_folder(path: Path) -> bool:
    """Whether a folder is meant for ONNX Runtime: it has a graph or its description, and no safetensors."""
    return ((path / GENAI).is_file() or (path / MODEL).is_file()) and not any(path.glob("*.safetensors"))


@dataclass(frozen=True)
class Span:
    """Where a tensor's bytes lie: `length` bytes at `offset` of `file`, or in the graph itself where `file` is None."""

    file: Path | None
    offset: int
    length: int


@dataclass(frozen=True)
class OnnxFolder:
    """`proto` is the onnx.ModelProto without external weights; `genai` and `config` are {} where the folder has none."""

    folder: Path
    model: Path
    proto: ModelProto
    genai: dict[str, Any]
    config: dict[str, Any]
    spans: dict[str, Span]
    """Of every initializer of the main graph, by name."""
    data_files: list[Path]
    edited: bool = False
    """Whether `proto` is another graph than that of `model`."""
    watched: tuple[str, ...] = ()
    """Names of values inside of the graph that an edited graph gives besides its outputs."""

    @property
    def files(self) -> list[Path]:
        """The files that decide what the model computes."""
        described = [self.folder / n for n in (GENAI, "config.json") if (self.folder / n).is_file()]
        return [*described, self.model, *self.data_files]

    @property
    def context(self) -> int | None:
        """The most tokens that the model was trained for, where the folder tells."""
        return self.genai.get("model", {}).get("context_length") or self.config.get("max_position_embeddings")

    @property
    def qdq_level(self) -> int:
        """The accuracy level of DequantizeLinear and MatMul."""
        return int(self.genai.get("model", {}).get("decoder", {}).get("session_options", {}).get(QDQ_LEVEL, QDQ_DEFAULT))

    def edit(self, level: int | None = None, head_level: int | None = None, watched: tuple[str, ...] = ()) -> OnnxFolder:
        """The folder with another graph, in memory. level: accuracy level of every quantized matrix; head_level: of the
        head's MatMulNBits, else as `level`; watched: float32 values inside of the graph."""
        from onnx import TensorProto, helper

        proto, genai, head = copy.deepcopy(self.proto), copy.deepcopy(self.genai), self.head()
        if level is not None:
            for node in proto.graph.node:
                if node.op_type == "MatMulNBits":
                    value = head_level if head_level is not None and node == head else level
                    for old in [a for a in node.attribute if a.name == LEVEL]:
                        node.attribute.remove(old)
                    node.attribute.append(helper.make_attribute(LEVEL, value))
            options = genai.setdefault("model", {}).setdefault("decoder", {}).setdefault("session_options", {})
            options[QDQ_LEVEL] = str(level)
        proto.graph.output.extend(helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in watched)
        return replace(self, proto=proto, genai=genai, edited=True, watched=watched)

    def head(self) -> NodeProto | None:
        """The product that gives the logits, None where the graph has none."""
        writers = {out: node for node in self.proto.graph.node for out in node.output}
        todo = ["logits"]
        while todo:
            node = writers.pop(todo.pop(), None)
            if node is not None and node.op_type.startswith(("MatMul", "Gemm")):
                return node
            todo += [] if node is None else node.input
        return None

    def operators(self) -> dict[str, int]:
        """How many of each operator the graph holds before ONNX Runtime optimises it."""
        return dict(sorted(Counter(n.op_type for n in self.proto.graph.node).items()))

    def matmul_nbits(self) -> list[dict[str, Any]]:
        """[{bits, block_size, symmetric, accuracy_level, matrices}] of the MatMulNBits nodes, the most frequent first."""
        found: Counter[tuple[Any, ...]] = Counter()
        for node in self.proto.graph.node:
            if node.op_type == "MatMulNBits":
                a = attributes(node)
                symmetric = len(node.input) < 4 or not node.input[3]
                found[a.get("bits", 4), a["block_size"], symmetric, a.get(LEVEL, 0)] += 1
        names = ("bits", "block_size", "symmetric", LEVEL)
        return [{**dict(zip(names, k, strict=True)), "matrices": n} for k, n in found.most_common()]

    def raw(self, tensor: TensorProto) -> np.ndarray:
        """The bytes of an initializer, uint8 [n]; those in external files are mapped, not read."""
        import numpy as np
        from onnx import numpy_helper

        span = self.spans[tensor.name]
        if span.file is None:
            return np.frombuffer(tensor.raw_data or numpy_helper.to_array(tensor).tobytes(), np.uint8)
        return np.memmap(span.file, np.uint8, "r", span.offset, (span.length,))

    def array(self, tensor: TensorProto) -> np.ndarray:
        """The values of an initializer, mapped likewise; those of less than 8 bits in external files stay packed."""
        from onnx import helper, numpy_helper

        span = self.spans[tensor.name]
        if span.file is None:
            return numpy_helper.to_array(tensor)
        if 8 * span.length != packed_bits(tensor):
            raise UserError(f"{tensor.name} has {span.length:,} bytes in {span.file.name}, its shape needs "
                            f"{packed_bits(tensor) // 8:,}", AGAIN)
        if bits_of(tensor.data_type) < 8:
            return self.raw(tensor)
        return self.raw(tensor).view(helper.tensor_dtype_to_np_dtype(tensor.data_type)).reshape(tuple(tensor.dims))


def open_onnx(folder: Path) -> OnnxFolder:
    """The graph of `folder`, its references checked. Raises UserError where it is incomplete or reaches out of the folder."""
    genai, config = _json(folder / GENAI), _json(folder / "config.json")
    name = genai.get("model", {}).get("decoder", {}).get("filename", MODEL)
    model = _inside(folder, str(name), GENAI)
    if not model.is_file():
        raise UserError(f"{folder} has no {name}", AGAIN)
    proto = read_graph(model)
    files = {span.file for tensor in _tensors(proto) if (span := _span(folder, model, tensor)).file is not None}
    spans = {tensor.name: _span(folder, model, tensor) for tensor in proto.graph.initializer}
    return OnnxFolder(folder, model, proto, genai, config, spans, sorted(f for f in files if f is not None))


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    return read_json_object(path, hint=AGAIN)


def read_graph(model: Path) -> ModelProto:
    """A graph without its external weights, its references unchecked. Not to be changed: others may be given the same."""
    stat = model.stat()
    return _load(model, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=2)  # one command asks for several things of one file; an evaluation may have two such folders
def _load(model: Path, modified: int, length: int) -> ModelProto:
    try:
        import onnx
    except ImportError as e:
        raise UserError(f"reading an ONNX model needs the package `onnx` ({e})", INSTALL) from e
    from google.protobuf.message import DecodeError

    try:
        proto = onnx.load(str(model), load_external_data=False)
    except DecodeError as e:
        raise UserError(f"{model} is not a complete ONNX model: {e}", AGAIN) from e
    if not proto.graph.node:
        raise UserError(f"{model} holds no graph", AGAIN)
    return proto


def _tensors(message: Any) -> Iterator[TensorProto]:
    """Every tensor anywhere in a message: initializers, constants, those of subgraphs and functions."""
    from onnx import TensorProto

    if isinstance(message, TensorProto):
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for item in [value] if hasattr(value, "ListFields") else value:
                yield from _tensors(item)


def _span(folder: Path, model: Path, tensor: TensorProto) -> Span:
    """Checked: the file is in the folder and long enough."""
    from onnx import TensorProto

    if tensor.data_location != TensorProto.EXTERNAL:
        return Span(None, 0, tensor.ByteSize() if not tensor.raw_data else len(tensor.raw_data))
    entries = external(tensor)
    # a hub snapshot is links into one folder of blobs: there the graph's own real place counts as inside too
    roots = (folder.resolve(), model.resolve().parent)
    file = _inside(folder, entries.get("location", ""), f"tensor {tensor.name} of {model.name}", roots)
    try:
        offset = int(entries.get("offset", 0))
        length = int(entries.get("length", packed_bits(tensor) // 8))
    except ValueError as e:
        raise UserError(f"{model} gives tensor {tensor.name} no valid place in {file.name}: {e}", AGAIN) from e
    if not file.is_file():
        raise UserError(f"{model.name} keeps its weights in {file.name}, and {folder} lacks that file", AGAIN)
    have = file.stat().st_size
    if offset < 0 or length < 0 or offset + length > have:
        raise UserError(f"{file} is {have:,} bytes long, and tensor {tensor.name} should end at {offset + length:,}", AGAIN)
    return Span(file, offset, length)


def _inside(folder: Path, location: str, who: str, roots: tuple[Path, ...] = ()) -> Path:
    """folder / location, which must be a relative path downwards; with `roots` its real place must be in one of them."""
    real = (folder / location).resolve()
    if not location or leaves(location) or (roots and not any(real.is_relative_to(root) for root in roots)):
        raise UserError(f"{who} in {folder} names {location!r}, which is not a file of that folder: refused",
                        "get the model from whoever made it, with all its files in one folder")
    return folder / location


def leaves(location: str) -> bool:
    """Whether a path leads out of the folder of whoever names it, on any system."""
    windows = PureWindowsPath(location)  # splits at both kinds of slash
    return bool(windows.root or windows.drive or ".." in windows.parts)


def external(tensor: TensorProto) -> dict[str, str]:
    """Where a tensor says that its bytes lie: location, offset, length; {} of one in the graph itself."""
    return {e.key: e.value for e in tensor.external_data}


def bits_of(data_type: int) -> int:
    """Bits that one value of an onnx.TensorProto data type takes in external data."""
    from onnx import TensorProto, helper

    if match := re.fullmatch(r"U?INT([24])|FLOAT(4)E2M1", TensorProto.DataType.Name(data_type)):
        return int(match[1] or match[2])
    return int(helper.tensor_dtype_to_np_dtype(data_type).itemsize) * 8


def packed_bits(tensor: TensorProto) -> int:
    """Bits of a tensor as it is stored, whole bytes."""
    return -(-elements(tensor) * bits_of(tensor.data_type) // 8) * 8


def elements(tensor: TensorProto) -> int:
    """How many values a tensor has."""
    n = 1
    for d in tensor.dims:
        n *= d
    return n


def attributes(node: NodeProto) -> dict[str, Any]:
    """A node's attributes by name."""
    from onnx import helper

    return {a.name: helper.get_attribute_value(a) for a in node.attribute}
