"""A folder that ONNX Runtime can run, written by llmc or another exporter. It holds a graph (model.onnx), weight files beside
it, and a JSON description (genai_config.json of onnxruntime-genai, or the config.json of other exporters).

Opening it reads the graph but no weights. It raises UserError if the graph or the JSON names a file outside the folder.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from llmc.errors import UserError
from llmc.formats.config_json import read_checked
from llmc.formats.genai_config import AGAIN, LEVEL, QDQ_DEFAULT, QDQ_LEVEL, read_genai
from llmc.formats.onnx_check import check_graph
from llmc.formats.onnx_proto import attributes, bits_of, external, packed_bits

if TYPE_CHECKING:
    import numpy as np
    from onnx import ModelProto, NodeProto, TensorProto

GENAI = "genai_config.json"
MODEL = "model.onnx"
INSTALL = "pip install 'llmc-toolkit[onnx]'"


def is_onnx_folder(path: Path) -> bool:
    """Whether a folder is meant for ONNX Runtime: it has a graph or genai_config.json, and no safetensors."""
    return ((path / GENAI).is_file() or (path / MODEL).is_file()) and not any(path.glob("*.safetensors"))


@dataclass(frozen=True)
class Span:
    """The place of a tensor's bytes: `length` bytes at `offset` of `file`. `file` is None if they are in the graph itself."""

    file: Path | None
    offset: int
    length: int


@dataclass(frozen=True)
class OnnxFolder:
    """An open ONNX folder. proto: the graph without external weights.  genai, config: the JSON files, {} if absent."""

    folder: Path
    model: Path
    proto: ModelProto
    genai: dict[str, Any]
    config: dict[str, Any]
    spans: dict[str, Span]
    """{name: place of the bytes} of every initializer of the main graph."""
    data_files: list[Path]
    edited: bool = False
    """Whether `proto` differs from the file `model`."""
    watched: tuple[str, ...] = ()
    """Names of inner values that an edited graph returns as additional outputs."""

    @property
    def files(self) -> list[Path]:
        """The files that determine what the model computes."""
        described = [self.folder / n for n in (GENAI, "config.json") if (self.folder / n).is_file()]
        return [*described, self.model, *self.data_files]

    @property
    def context(self) -> int | None:
        """The maximum context length in tokens; None if the folder does not state it."""
        return self.genai.get("model", {}).get("context_length") or self.config.get("max_position_embeddings")

    @property
    def qdq_level(self) -> int:
        """The accuracy level of fused DequantizeLinear and MatMul."""
        return int(self.genai.get("model", {}).get("decoder", {}).get("session_options", {}).get(QDQ_LEVEL, QDQ_DEFAULT))

    def edit(self, level: int | None = None, head_level: int | None = None, watched: tuple[str, ...] = ()) -> OnnxFolder:
        """A copy with an edited graph, in memory. level: accuracy level of every quantized matrix, experts included.
        head_level: that of the head's MatMulNBits (None: `level`).  watched: names of float32 inner values to return."""
        from onnx import TensorProto, helper

        proto, genai, head = copy.deepcopy(self.proto), copy.deepcopy(self.genai), self.head()
        if level is not None:
            for node in proto.graph.node:
                if node.op_type in ("MatMulNBits", "QMoE"):
                    value = head_level if head_level is not None and node == head else level
                    for old in [a for a in node.attribute if a.name == LEVEL]:
                        node.attribute.remove(old)
                    node.attribute.append(helper.make_attribute(LEVEL, value))
            options = genai.setdefault("model", {}).setdefault("decoder", {}).setdefault("session_options", {})
            options[QDQ_LEVEL] = str(level)
        proto.graph.output.extend(helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in watched)
        return replace(self, proto=proto, genai=genai, edited=True, watched=watched)

    def head(self) -> NodeProto | None:
        """The matrix product that gives the logits; None if the graph has none."""
        writers = {out: node for node in self.proto.graph.node for out in node.output}
        todo = ["logits"]
        while todo:
            node = writers.pop(todo.pop(), None)
            if node is not None and node.op_type.startswith(("MatMul", "Gemm")):
                return node
            todo += [] if node is None else node.input
        return None

    def operators(self) -> dict[str, int]:
        """{operator: number of nodes}, before ONNX Runtime optimizes the graph."""
        return dict(sorted(Counter(n.op_type for n in self.proto.graph.node).items()))

    def matmul_nbits(self) -> list[dict[str, Any]]:
        """[{bits, block_size, symmetric, accuracy_level, matrices}] of the MatMulNBits nodes, most frequent first."""
        found: Counter[tuple[Any, ...]] = Counter()
        for node in self.proto.graph.node:
            if node.op_type == "MatMulNBits":
                a = attributes(node)
                symmetric = len(node.input) < 4 or not node.input[3]
                found[a.get("bits", 4), a["block_size"], symmetric, a.get(LEVEL, 0)] += 1
        names = ("bits", "block_size", "symmetric", LEVEL)
        return [{**dict(zip(names, k, strict=True)), "matrices": n} for k, n in found.most_common()]

    def raw(self, tensor: TensorProto) -> np.ndarray:
        """The bytes of an initializer, uint8 [n]. External data is mapped, not read."""
        import numpy as np
        from onnx import numpy_helper

        span = self.spans[tensor.name]
        if span.file is None:
            return np.frombuffer(tensor.raw_data or numpy_helper.to_array(tensor).tobytes(), np.uint8)
        return np.memmap(span.file, np.uint8, "r", span.offset, (span.length,))

    def array(self, tensor: TensorProto) -> np.ndarray:
        """The values of an initializer. External data is mapped; values of less than 8 bits there stay packed, uint8 [n]."""
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
    """Open `folder` and check all references to files. Raises UserError if a file is missing or outside the folder."""
    genai, config = ({} if not path.is_file() else read(path)
                     for path, read in ((folder / GENAI, read_genai), (folder / "config.json", read_checked)))
    name = genai.get("model", {}).get("decoder", {}).get("filename", MODEL)
    model = _inside(folder, str(name), GENAI)
    if not model.is_file():
        raise UserError(f"{folder} has no {name}", AGAIN)
    proto = read_graph(model)
    check_graph(model, proto)
    files = {span.file for tensor in _tensors(proto) if (span := _span(folder, model, tensor)).file is not None}
    spans = {tensor.name: _span(folder, model, tensor) for tensor in proto.graph.initializer}
    return OnnxFolder(folder, model, proto, genai, config, spans, sorted(f for f in files if f is not None))


def read_graph(model: Path) -> ModelProto:
    """A graph without external weights, its references not checked. Do not change it: the object is cached and shared."""
    stat = model.stat()
    return _load(model, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=2)  # a command opens the same file several times; an evaluation may use two folders
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
    """The place of a tensor's bytes. Raises UserError if the file is missing, too short or outside the folder."""
    from onnx import TensorProto

    if tensor.data_location != TensorProto.EXTERNAL:
        return Span(None, 0, tensor.ByteSize() if not tensor.raw_data else len(tensor.raw_data))
    entries = external(tensor)
    # files of a hub snapshot are links into a folder of blobs: the folder of the graph's real file counts as inside too
    roots = (folder.resolve(), model.resolve().parent)
    file = _inside(folder, entries.get("location", ""), f"tensor {tensor.name} of {model.name}", roots)
    try:
        offset = int(entries.get("offset", 0))
        length = int(entries.get("length", packed_bits(tensor) // 8))
    except ValueError as e:
        raise UserError(f"{model} gives tensor {tensor.name} no valid place in {file.name}: {e}", AGAIN) from e
    if not file.is_file():
        raise UserError(f"{model.name} keeps its weights in {file.name}, but {folder} lacks that file", AGAIN)
    have = file.stat().st_size
    if offset < 0 or length < 0 or offset + length > have:
        raise UserError(f"{file} is {have:,} bytes long, but tensor {tensor.name} should end at {offset + length:,}", AGAIN)
    return Span(file, offset, length)


def _inside(folder: Path, location: str, source: str, roots: tuple[Path, ...] = ()) -> Path:
    """Returns folder / location. Raises UserError unless `location` is a relative path inside the folder.

    source: what names the file, for the message.  roots: if given, one of them must contain the resolved path.
    """
    try:
        real = (folder / location).resolve()
    except (OSError, RuntimeError, ValueError) as e:  # a link to itself; a name that no file can have
        raise UserError(f"{source} in {folder} names {location!r:.100}, which cannot be a file: {e}", AGAIN) from e
    if not location or leaves_folder(location) or (roots and not any(real.is_relative_to(root) for root in roots)):
        raise UserError(f"{source} in {folder} names {location!r}, which is not a file inside that folder",
                        "get the model again, with all its files in one folder")
    return folder / location


def leaves_folder(location: str) -> bool:
    """Whether a path is absolute or contains `..`, on any operating system."""
    windows = PureWindowsPath(location)  # splits at both kinds of slash
    return bool(windows.root or windows.drive or ".." in windows.parts)
