"""Round to nearest: each group's scale by least squared error, no data. The yardstick that GPTQ must beat, and the named
fallback where a Hessian cannot be factored."""

from __future__ import annotations

import torch

from llmc.block_grids import BlockTensor
from llmc.compress.quantize.config import AnyGrid
from llmc.compress.quantize.gptq import search_factors
from llmc.grids import QuantizedTensor


def rtn(weight: torch.Tensor, grid: AnyGrid) -> QuantizedTensor | BlockTensor:
    """Quantise `weight` float32 [out, in]; the factors of a group minimise the squared error over its columns."""
    w = weight.t().contiguous()
    factors = search_factors(w, torch.eye(w.shape[0], device=w.device), None, grid)
    return factors.tensor(factors.nearest(w))
