"""Proof of a W8A8 file. Whole numbers come out the same or not, but logits cannot be compared at the end: a difference of
1e-7 between two correct runs turns over a code here and there, and after 30 layers what is left of it is as large as all
rounding together (a KL divergence of 0.04 was seen on SmolLM2-135M). So torch and ONNX Runtime are held together at every
linear. ONNX Runtime tells what came in and out of it;

1. what came out must be the same integers times the same scales in torch, for what came in;
2. torch, given at every linear before what came in there, must arrive at what came in within float noise, and at the logits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from llmc.errors import UserError
from llmc.export.onnx import w8a8
from llmc.export.onnx.emit import Emitter
from llmc.export.onnx.weights import Weights
from llmc.export.parity import REPORT

MOST_PRODUCT = 1e-5  # of a linear's largest output; 0 is what was seen
MOST_INPUT = 2e-3  # relative error (root mean square) of what comes in; as for logits (verify.py)


class Linears:
    """The W8A8 linears of a graph, none in files of other kinds. `values`: float32 [n, ..] of the names in `watched`."""

    def __init__(self, emitter: Emitter, weights: Weights) -> None:
        self.linears, self.weights = emitter.rounded, weights
        self.pieces = {w.node: w.pieces for w in emitter.placed}
        self.roots = {p.module: x.root for x in self.linears for p in self.pieces[x.node]}
        self.watched = tuple(dict.fromkeys(name for x in self.linears for name in (x.root, x.output)))
        self.values: dict[str, np.ndarray] = {}
        self.worst_input = 0.0

    def products(self) -> dict[str, Any]:
        """The first proof; raises UserError, returns what was compared."""
        worst, equal, count = 0.0, 0, 0
        for x in self.linears:
            theirs = torch.from_numpy(self.values[x.output])
            ours = w8a8.linear(torch.from_numpy(self.values[x.root]), self.weights.codes(self.pieces[x.node]))
            error = float((ours - theirs).abs().max() / ours.abs().max().clamp_min(w8a8.TINY))
            if not error <= MOST_PRODUCT:  # NaN must fail too
                raise UserError(
                    f"ONNX Runtime's MatMulInteger gives other products than torch at {x.node}: {error:.3g} of the largest "
                    f"(at most {MOST_PRODUCT:g})",
                    "x86 CPUs without VNNI saturate there (onnxruntime#6004): use --dtype int8 for them; else " + REPORT)
            worst, equal, count = max(worst, error), equal + int((ours == theirs).sum()), count + ours.numel()
        return {"linears": len(self.linears), "products": count, "equal": equal, "largest_error": worst,
                "max_largest_error": MOST_PRODUCT, "input_error": self.worst_input, "max_input_error": MOST_INPUT}

    def replace(self, module: str, x: torch.Tensor) -> torch.Tensor:
        """The second proof at one linear of torch: x [1, n, K] is compared, and what ONNX Runtime made of its own goes on."""
        if module not in self.roots:
            return x
        theirs = torch.from_numpy(self.values[self.roots[module]]).view(x.shape)
        error = float((x - theirs).norm() / x.norm())
        if not error <= MOST_INPUT:
            raise UserError(f"ONNX Runtime's input of {module} is not torch's: relative error {error:.3g} (at most "
                            f"{MOST_INPUT:g})", REPORT)
        self.worst_input = max(self.worst_input, error)
        return w8a8.as_rounded(theirs)
