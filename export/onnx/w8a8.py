"""W8A8: linears with weights and inputs in 8 bits, in standard ONNX operators only (opset 18).

Weights are symmetric, with a scale for each row (output channel). Inputs are rounded at run time, with a scale for each
token: SmoothQuant's dynamic per-token activations (Xiao et al., arXiv:2211.10438, section 4, O1), after its channel scaling
(`llmc transform --scaling smoothquant`). For x [.., K] and W [K, N]:

    s = max(max |x| * (1 / 127), TINY)       float32 [.., 1]
    q = Round(x / s) + 128                    uint8 [.., K], 1 to 255; once for all linears that read x
    y = float32(MatMulInteger(q, W, 128)) * s * scales

One scale for all tokens (DynamicQuantizeLinear, quantize_dynamic) is not offered: the largest value of one token then sets
the step of all, and accuracy collapses (onnxruntime#18430, #21635). q is unsigned because ONNX Runtime has fast x86 kernels
only for unsigned times signed. On CPUs without VNNI they add pairs of products in 16 bits, which saturate
(onnxruntime#6004).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from llmc.formats.types import IntegerType, QuantizedTensor

INVERSE = float(np.float32(1 / 127))
TINY = float(np.float32(1e-30))  # the scale of an all-zero token
ZERO = 128


@dataclass(frozen=True)
class Rounded:
    """A linear in the graph: the names of its node, its input and its output."""

    node: str
    root: str
    output: str


def round_rows(w: torch.Tensor) -> QuantizedTensor:
    """float [N, K] rounded to nearest: codes 1 to 255 around 128, with a float32 scale for each row, max |w| / 127.

    There is no search for the scale. On SmolLM2-135M the best of ten smaller scales lowers the squared error by only 0.2 %,
    with or without SmoothQuant: for 93 % of the rows the full range is best."""
    w = w.to(torch.float32)
    scales = w.abs().amax(1, keepdim=True) / 127
    inverse = torch.where(scales == 0, torch.zeros_like(scales), 1 / scales)
    codes = (w * inverse).round().clamp(-127, 127) + ZERO
    return QuantizedTensor(IntegerType(8, w.shape[1]), codes.to(torch.uint8), scales)


def round_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x float32 [.., K] -> codes around zero (whole numbers, float32 [.., K]) and scales [.., 1], as the graph computes."""
    scale = (x.abs().amax(-1, keepdim=True) * INVERSE).clamp_min(TINY)
    return (x / scale).round(), scale


def as_rounded(x: torch.Tensor) -> torch.Tensor:
    """x rounded: its codes times their scales."""
    codes, scale = round_tokens(x)
    return codes * scale


def linear(x: torch.Tensor, w: QuantizedTensor) -> torch.Tensor:
    """x float32 [.., K], w [N, K] -> float32 [.., N], with every rounding of the graph."""
    codes, scale = round_tokens(x)
    sums = codes.double() @ (w.codes.double() - ZERO).T  # whole numbers, exact
    return sums.to(torch.float32) * scale * w.scales[:, 0]


def nodes(b: Any, linear: Rounded, weight: str, scales: str, k: int, n: int) -> None:
    """Add the nodes of a linear. Nodes that round its input have the input's name, so the builder adds them once for all
    linears that share it."""
    float_, uint8, int32 = ir.DataType.FLOAT, ir.DataType.UINT8, ir.DataType.INT32

    def node(kind: str, inputs: list[str], name: str, dtype: ir.DataType, last: int, **attributes: Any) -> str:
        output = f"{name}/output_0"
        b.make_node(kind, inputs=inputs, outputs=[output], name=name, **attributes)
        b.make_value(output, dtype, shape=["batch_size", "sequence_length", last])
        return output

    at, constant = f"{linear.root}/int8", "/model/constants"
    size = node("Abs", [linear.root], f"{at}/Abs", float_, k)
    largest = node("ReduceMax", [size, f"{constant}/INT64/[-1]"], f"{at}/ReduceMax", float_, 1, keepdims=1)
    step = node("Mul", [largest, f"{constant}/FLOAT/{INVERSE!r}"], f"{at}/Mul", float_, 1)
    scale = node("Max", [step, f"{constant}/FLOAT/{TINY!r}"], f"{at}/Max", float_, 1)
    steps = node("Div", [linear.root, scale], f"{at}/Div", float_, k)
    whole = node("Round", [steps], f"{at}/Round", float_, k)
    above = node("Add", [whole, f"{constant}/FLOAT/{float(ZERO)!r}"], f"{at}/Add", float_, k)
    codes = node("Cast", [above], f"{at}/Cast", uint8, k, to=uint8)

    sums = node("MatMulInteger", [codes, weight, f"{constant}/UINT8/{ZERO}"], f"{linear.node}/Integer", int32, n)
    values = node("Cast", [sums], f"{linear.node}/Cast", float_, n, to=float_)
    tokens = node("Mul", [values, scale], f"{linear.node}/tokens", float_, n)
    b.make_node("Mul", inputs=[tokens, scales], outputs=[linear.output], name=f"{linear.node}/rows")
