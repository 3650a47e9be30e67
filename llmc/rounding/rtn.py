"""Round to nearest, without calibration: each group gets the scale with the smallest squared error.

It is the baseline for GPTQ, and the reported fallback if a Hessian cannot be factored. With an importance matrix, the mean
square of each input column weights its error."""

from __future__ import annotations

import torch

from llmc.formats.types import AnyType, BlockTensor, QuantizedTensor
from llmc.rounding.search import search_factors


def rtn(weight: torch.Tensor, qtype: AnyType, importance: torch.Tensor | None = None) -> QuantizedTensor | BlockTensor:
    """Quantize `weight` float32 [out, in]; the factors of a group minimize the squared error over its columns.

    importance: float32 [in], positive; the weight of each column's error (a diagonal Hessian). None: equal weights.
    """
    w = weight.t().contiguous()
    diagonal = torch.ones(w.shape[0]) if importance is None else importance
    factors = search_factors(w, torch.diag(diagonal.to(w.device)), None, qtype)
    return factors.tensor(factors.nearest(w))
