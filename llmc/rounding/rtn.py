"""Round to nearest: each group's scale by least squared error, no data. The yardstick that GPTQ must beat, and the named
fallback where a Hessian cannot be factored. With an importance matrix each column's error counts by its mean square."""

from __future__ import annotations

import torch

from llmc.formats.types import AnyType, BlockTensor, QuantizedTensor
from llmc.rounding.search import search_factors


def rtn(weight: torch.Tensor, qtype: AnyType, importance: torch.Tensor | None = None) -> QuantizedTensor | BlockTensor:
    """Quantize `weight` float32 [out, in]; the factors of a group minimise the squared error over its columns.

    importance: float32 [in], positive; what an error in each column counts (a diagonal Hessian). None: all alike.
    """
    w = weight.t().contiguous()
    diagonal = torch.ones(w.shape[0]) if importance is None else importance
    factors = search_factors(w, torch.diag(diagonal.to(w.device)), None, qtype)
    return factors.tensor(factors.nearest(w))
