"""Verification of a W8A8 file.

The final logits of two correct runs cannot be compared directly. A difference of 1e-7 between them changes some codes, and
after 30 layers the effect is as large as that of all rounding (a KL divergence of 0.04 on SmolLM2-135M). So torch and ONNX
Runtime are compared at every linear. ONNX Runtime outputs the input and the output of each linear. Then:

1. From ONNX Runtime's input, torch must compute the same output: the same integers times the same scales.
2. torch runs the model with ONNX Runtime's inputs at all earlier linears. Its own input of a linear, and its logits, must
   equal those of ONNX Runtime within float noise.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from llmc.errors import UserError
from llmc.export.onnx import w8a8
from llmc.export.onnx.emit import Emitter
from llmc.export.onnx.weights import Weights
from llmc.export.parity import PLEASE_REPORT

MOST_PRODUCT = 1e-5  # largest error relative to a linear's largest output; the measured error is 0
MOST_INPUT = 2e-3  # relative RMS error of an input, and of the logits after it


class Linears:
    """The W8A8 linears of a graph; empty for other files. values: float32 [n, ..] of the names in `watched`."""

    def __init__(self, emitter: Emitter, weights: Weights) -> None:
        self.linears, self.weights = emitter.rounded, weights
        self.pieces = {w.node: w.pieces for w in emitter.placed}
        self.roots = {p.module: x.root for x in self.linears for p in self.pieces[x.node]}
        self.watched = tuple(dict.fromkeys(name for x in self.linears for name in (x.root, x.output)))
        self.values: dict[str, np.ndarray] = {}
        self.worst_input = 0.0

    def products(self) -> dict[str, Any]:
        """Run the first check for all linears; return its figures, raise UserError if a product differs."""
        worst, equal, count = 0.0, 0, 0
        for x in self.linears:
            found = torch.from_numpy(self.values[x.output])
            expected = w8a8.linear(torch.from_numpy(self.values[x.root]), self.weights.codes(self.pieces[x.node]))
            error = float((expected - found).abs().max() / expected.abs().max().clamp_min(w8a8.TINY))
            if not error <= MOST_PRODUCT:  # NaN must fail too
                raise UserError(
                    f"ONNX Runtime's MatMulInteger gives other products than torch at {x.node}: {error:.3g} of the largest "
                    f"(at most {MOST_PRODUCT:g})",
                    "x86 CPUs without VNNI saturate there (onnxruntime#6004): use --dtype int8 for them; else "
                    + PLEASE_REPORT)
            worst, equal, count = max(worst, error), equal + int((expected == found).sum()), count + expected.numel()
        return {"linears": len(self.linears), "products": count, "equal": equal, "largest_error": worst,
                "max_largest_error": MOST_PRODUCT}

    def replace(self, module: str, x: torch.Tensor) -> torch.Tensor:
        """Run the second check at one linear: compare torch's input x [1, n, K]; return ONNX Runtime's input, rounded."""
        if module not in self.roots:
            return x
        found = torch.from_numpy(self.values[self.roots[module]]).view(x.shape)
        error = float((x - found).norm() / x.norm())
        if not error <= MOST_INPUT:
            raise UserError(f"ONNX Runtime's input of {module} is not torch's: relative error {error:.3g} (at most "
                            f"{MOST_INPUT:g})", PLEASE_REPORT)
        self.worst_input = max(self.worst_input, error)
        return w8a8.as_rounded(found)
