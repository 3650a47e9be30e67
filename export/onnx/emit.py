"""The graph nodes of matrices, and their tensors. No data is read here: every tensor has a function that makes its data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from llmc.errors import UserError
from llmc.export.onnx import layout, w8a8
from llmc.export.onnx.skeleton import Stack
from llmc.export.onnx.weights import W8A8, Form, Piece, Weights, form_name
from llmc.formats.types import IntegerType

NBITS = "com.microsoft"
QMOE_BITS, QMOE_BLOCKS = 4, (32, 64, 128)  # its CPU kernel for 8 bits rounds activations, at every accuracy level


@dataclass(frozen=True)
class OnnxTensor:
    """A tensor of the file. `data` makes its bytes when they are written."""

    name: str
    dtype: ir.DataType
    shape: tuple[int, ...]
    data: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return int(np.ceil(np.prod(self.shape) * self.dtype.itemsize))


@dataclass(frozen=True)
class Placed:
    """A matrix in the graph: its node, its rows, its form and the names of its tensors."""

    node: str
    pieces: list[Piece]
    form: Form
    weight: str
    scales: str | None = None
    zeros: str | None = None
    transposed: bool = False
    """Stored as [K, N]."""
    signed: bool = False
    """Codes stored as two's complement of code - 2**(bits-1)."""
    standard: bool = False
    """Packed for DequantizeLinear: no padding at the end of a row."""
    order: np.ndarray | None = None
    """The row of the joined pieces that each row is; None: the same."""


class Emitter:
    """Adds the nodes of matrices to the graph and collects their tensors. qdq: standard operators instead of MatMulNBits."""

    def __init__(self, weights: Weights, qdq: bool) -> None:
        self.weights, self.qdq = weights, qdq
        self.entries: dict[str, OnnxTensor] = {}
        self.placed: list[Placed] = []
        self.rounded: list[w8a8.Rounded] = []

    def matmul(self, b: Any, name: str, root: str, output: str, pieces: list[Piece]) -> None:
        """Add nodes that compute `output` = `root` @ W.T, where W [N, K] has the rows of `pieces`."""
        form = self.weights.form_of(pieces)
        prefix = name[1:].replace("/", ".")
        n, k = sum(p.stop - p.start for p in pieces), self.weights.columns(pieces[0].module)
        if form == W8A8:
            w = self._rows(b, prefix, name, pieces, n, k)
            self.rounded.append(w8a8.Rounded(name, root, output))
            w8a8.nodes(b, self.rounded[-1], w.weight, str(w.scales), k, n)
        elif not isinstance(form, IntegerType):
            weight = self._float(b, f"{prefix}.weight", pieces, form, (k, n), transposed=True)
            self.placed.append(Placed(name, pieces, form, weight, transposed=True))
            b.make_node("MatMul", inputs=[root, self._cast(b, name, weight, form, [k, n])], outputs=[output], name=name)
        elif self.qdq:
            w = self._quantized(b, prefix, name, pieces, form, n, k, transposed=True)
            values = f"{name}/DequantizeLinear/output_0"
            b.make_node("DequantizeLinear", inputs=[w.weight, w.scales, *([w.zeros] if w.zeros else [])], outputs=[values],
                        name=f"{name}/DequantizeLinear", axis=0, block_size=form.group_size)
            b.make_value(values, ir.DataType.FLOAT, shape=[k, n])
            b.make_node("MatMul", inputs=[root, values], outputs=[output], name=name)
        else:
            w = self._quantized(b, prefix, name, pieces, form, n, k)
            b.make_node("MatMulNBits", inputs=[root, w.weight, w.scales, *([w.zeros] if w.zeros else [])], outputs=[output],
                        name=name, domain=NBITS, K=k, N=n, bits=form.bits, block_size=form.group_size, accuracy_level=0)

    def experts(self, b: Any, name: str, stacks: tuple[Stack, Stack]) -> tuple[dict[str, Any], dict[str, str]]:
        """Add the tensors of the two products of a layer's experts, [experts, N, K] each.

        Returns the attributes and the inputs of the operator that computes with them. It is QMoE where that holds the codes
        exactly, else MoE with float values."""
        forms = [self._one_form(name, stack) for stack in stacks]
        first = forms[0]
        attributes: dict[str, Any] = {"op_type": "MoE"}
        if isinstance(first, IntegerType) and forms[0] == forms[1] and not self.qdq and (
                first.bits == QMOE_BITS and first.group_size in QMOE_BLOCKS):
            attributes = {"op_type": "QMoE", "expert_weight_bits": first.bits, "block_size": first.group_size}
        inputs: dict[str, str] = {}
        for i, (stack, form, kind) in enumerate(zip(stacks, forms, ("gate_up_proj", "down_proj"), strict=True), 1):
            node = f"{name}/{kind}"
            prefix = node[1:].replace("/", ".")
            n, k = len(stack.order), self.weights.columns(stack.pieces[0].module)
            if isinstance(form, IntegerType):
                w = self._quantized(b, prefix, node, stack.pieces, form, n, k, stack=stack,
                                    standard=attributes["op_type"] == "MoE")
                inputs |= {f"weight{i}": w.weight, f"scales{i}": str(w.scales), f"zero_points{i}": w.zeros or ""}
                if w.standard:
                    inputs[f"weight{i}"] = f"{node}/DequantizeLinear/output_0"
                    b.make_node("DequantizeLinear", inputs=[w.weight, w.scales, *([w.zeros] if w.zeros else [])],
                                outputs=[inputs[f"weight{i}"]], name=f"{node}/DequantizeLinear", axis=2,
                                block_size=form.group_size)
                    b.make_value(inputs[f"weight{i}"], ir.DataType.FLOAT, shape=[stack.experts, n // stack.experts, k])
            else:
                shape = (stack.experts, n // stack.experts, k)
                weight = self._float(b, f"{prefix}.weight", stack.pieces, form, shape, order=stack.order)
                self.placed.append(Placed(node, stack.pieces, form, weight, order=stack.order))
                inputs[f"weight{i}"] = self._cast(b, node, weight, form, list(shape))
        return attributes, inputs

    def _one_form(self, name: str, stack: Stack) -> Form:
        forms = {self.weights.form(p.module) for p in stack.pieces}
        if len(forms) > 1:
            raise UserError(f"ONNX Runtime has one type for all experts of a layer, but those of {name} have "
                            f"{' and '.join(sorted(map(form_name, forms)))}",
                            "quantize them with one type, or export it as GGUF (--format gguf)")
        return forms.pop()

    def lookup(self, b: Any, basename: str, pieces: list[Piece]) -> str:
        """Add nodes that look up the embedding of `input_ids`; return the name of their output, float32 [.., K]."""
        form = self.weights.form_of(pieces)
        prefix = basename[1:].replace("/", ".")
        n, k = sum(p.stop - p.start for p in pieces), self.weights.columns(pieces[0].module)
        ids = b.input_names["input_ids"]
        if isinstance(form, IntegerType):
            return self._lookup_codes(b, basename, prefix, pieces, form, n, k)
        if self.weights.tied:  # gather columns of the head's tensor [K, N]: so the file has no second copy
            b.make_node("Gather", inputs=["lm_head.MatMul.weight", ids], outputs=[f"{basename}/Gather/output_0"],
                        name=f"{basename}/Gather", axis=1)
            dtype = ir.DataType.FLOAT if form == "fp32" else ir.DataType.FLOAT16
            b.make_value(f"{basename}/Gather/output_0", dtype, shape=[k, "batch_size", "sequence_length"])
            rows = f"{basename}/Transpose/output_0"
            b.make_node("Transpose", inputs=[f"{basename}/Gather/output_0"], outputs=[rows], name=f"{basename}/Transpose",
                        perm=[1, 2, 0])
            b.make_value(rows, dtype, shape=["batch_size", "sequence_length", k])
        else:
            weight = self._float(b, f"{prefix}.weight", pieces, form, (n, k))
            self.placed.append(Placed(f"{basename}/Gather", pieces, form, weight))
            rows = f"{basename}/Gather/output_0"
            b.make_node("Gather", inputs=[weight, ids], outputs=[rows], name=f"{basename}/Gather")
        return self._cast(b, basename, rows, form, ["batch_size", "sequence_length", k])

    def _lookup_codes(self, b: Any, basename: str, prefix: str, pieces: list[Piece], form: IntegerType, n: int,
                      k: int) -> str:
        """Add nodes that look up a quantized embedding, which is always symmetric; return the name of their output.

        The embedding has the layout of MatMulNBits; if it is tied, it uses the head's tensors. With qdq it has its own
        tensors: codes and scales are gathered separately and then dequantized."""
        node = f"{basename}/GatherBlockQuantized"
        blocks, ids = k // form.group_size, b.input_names["input_ids"]
        if self.qdq:
            w = self._quantized(b, prefix, f"{basename}/DequantizeLinear", pieces, form, n, k)
            gathered = []
            for part, name in (("codes", w.weight), ("scales", w.scales)):
                gathered.append(f"{basename}/{part}/output_0")
                b.make_node("Gather", inputs=[name, ids], outputs=[gathered[-1]], name=f"{basename}/{part}")
            b.make_node("DequantizeLinear", inputs=gathered, outputs=[f"{basename}/DequantizeLinear/output_0"],
                        name=f"{basename}/DequantizeLinear", axis=2, block_size=form.group_size)
            return f"{basename}/DequantizeLinear/output_0"
        if self.weights.tied:
            codes, scales = "lm_head.MatMul.weight.codes", "lm_head.MatMul.weight.scales"
        else:
            w = self._quantized(b, prefix, node, pieces, form, n, k)
            codes, scales = w.weight, str(w.scales)
        cut, rows = f"{basename}/scales/output_0", f"{basename}/Reshape/output_0"
        b.make_node("Reshape", inputs=[scales, f"/model/constants/INT64/[{n}, {blocks}, 1]"], outputs=[cut],
                    name=f"{basename}/scales")
        b.make_node("GatherBlockQuantized", inputs=[codes, ids, cut], outputs=[f"{node}/output_0"], name=node, domain=NBITS,
                    bits=form.bits, block_size=form.group_size, gather_axis=0, quantize_axis=2)
        b.make_node("Reshape", inputs=[f"{node}/output_0", f"/model/constants/INT64/[0, 0, {k}]"], outputs=[rows],
                    name=f"{basename}/Reshape")
        b.make_value(cut, ir.DataType.FLOAT, shape=[n, blocks, 1])
        b.make_value(f"{node}/output_0", ir.DataType.FLOAT, shape=["batch_size", "sequence_length", blocks, form.group_size])
        return rows

    def _float(self, b: Any, name: str, pieces: list[Piece], form: Form, shape: tuple[int, ...],
               transposed: bool = False, order: np.ndarray | None = None) -> str:
        def data() -> np.ndarray:
            w = self.weights.values(pieces)
            values = (w.t().contiguous() if transposed else w).numpy()
            return values if order is None else values[order]

        dtype = ir.DataType.FLOAT if form == "fp32" else ir.DataType.FLOAT16
        return self._tensor(b, OnnxTensor(name, dtype, shape, data))

    def _cast(self, b: Any, basename: str, value: str, form: Form, shape: list[Any]) -> str:
        """Add a cast of float16 values to float32. ONNX Runtime folds the cast of a stored matrix when it loads the file."""
        if form == "fp32":
            return value
        cast = f"{basename}/Cast/output_0"
        b.make_node("Cast", inputs=[value], outputs=[cast], name=f"{basename}/Cast", to=ir.DataType.FLOAT)
        b.make_value(cast, ir.DataType.FLOAT, shape=shape)
        return cast

    def _rows(self, b: Any, prefix: str, node: str, pieces: list[Piece], n: int, k: int) -> Placed:
        """Add the tensors of a W8A8 matrix: codes [K, N], scales [N]."""
        def codes() -> np.ndarray:
            return np.ascontiguousarray(layout.signed(self.weights.codes(pieces).codes.numpy(), 8).T)

        def scales() -> np.ndarray:
            return self.weights.codes(pieces).scales[:, 0].numpy()

        placed = Placed(node, pieces, W8A8,
                        self._tensor(b, OnnxTensor(f"{prefix}.weight.codes", ir.DataType.INT8, (k, n), codes)),
                        self._tensor(b, OnnxTensor(f"{prefix}.weight.scales", ir.DataType.FLOAT, (n,), scales)),
                        transposed=True, signed=True)
        self.placed.append(placed)
        return placed

    def _quantized(self, b: Any, prefix: str, node: str, pieces: list[Piece], qtype: IntegerType, n: int, k: int,
                   transposed: bool = False, stack: Stack | None = None, standard: bool | None = None) -> Placed:
        """Add the codes, the scales and, if asymmetric, the zero points of a matrix; [K, N] if `transposed`.

        stack: the matrix is that of all experts, and its tensors have an axis for them.  standard: for DequantizeLinear, by
        default with --int4 qdq."""
        blocks, bits = k // qtype.group_size, qtype.bits
        standard = self.qdq if standard is None else standard
        signed = standard and qtype.symmetric
        order = slice(None) if stack is None else stack.order
        dtype = ir.DataType.UINT8
        scale_shape: tuple[int, ...] = (n, blocks)
        code_shape: tuple[int, ...] = (n, blocks, qtype.group_size * bits // 8)
        zero_shape: tuple[int, ...] = (n, -(-blocks * bits // 8))
        if standard:
            dtype = {(4, True): ir.DataType.INT4, (4, False): ir.DataType.UINT4, (8, True): ir.DataType.INT8,
                     (8, False): ir.DataType.UINT8}[bits, qtype.symmetric]
            code_shape, scale_shape = ((k, n), (blocks, n)) if transposed else ((n, k), (n, blocks))
            zero_shape = scale_shape
        if stack is not None:
            each = n // stack.experts
            code_shape = (stack.experts, each, k if standard else math.prod(code_shape[1:]))
            scale_shape, zero_shape = ((stack.experts, each, shape[1]) for shape in (scale_shape, zero_shape))

        def codes() -> np.ndarray:
            c = self.weights.codes(pieces).codes.numpy()[order]
            c = layout.signed(c, bits) if signed else c
            c = np.ascontiguousarray(c.T) if transposed else c
            return layout.pack(c.reshape(1, -1) if standard else c, bits)  # standard: no padding at the end of a row

        def scales() -> np.ndarray:
            s = self.weights.codes(pieces).scales.float().numpy()[order]
            return np.ascontiguousarray(s.T) if transposed else s

        def zeros() -> np.ndarray:
            z = self.weights.codes(pieces).zeros.numpy()[order]  # type: ignore[union-attr]
            if standard:
                z = np.ascontiguousarray(z.T if transposed else z).reshape(1, -1)
            return layout.pack(z, bits)

        def tensor(part: str, dtype: ir.DataType, shape: tuple[int, ...], data: Callable[[], np.ndarray]) -> str:
            return self._tensor(b, OnnxTensor(f"{prefix}.weight.{part}", dtype, shape, data))

        placed = Placed(node, pieces, qtype, tensor("codes", dtype, code_shape, codes),
                        tensor("scales", ir.DataType.FLOAT, scale_shape, scales),
                        None if qtype.symmetric else tensor("zeros", dtype, zero_shape, zeros), transposed, signed, standard,
                        None if stack is None else stack.order)
        self.placed.append(placed)
        return placed

    def _tensor(self, b: Any, entry: OnnxTensor) -> str:
        """Register a tensor without its bytes; return its name."""
        self.entries[entry.name] = entry
        value = b.make_value(entry.name, entry.dtype, entry.shape)
        value.const_value = ir.LazyTensor(_not_yet, dtype=entry.dtype, shape=ir.Shape(entry.shape), name=entry.name)
        b.model.graph.register_initializer(value)
        return entry.name


def _not_yet() -> ir.TensorProtocol:
    raise AssertionError("the writer replaces this by the tensor's position in the data file")
