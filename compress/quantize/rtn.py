"""Round to nearest: each group's scale by least squared error, no data. The yardstick that GPTQ must beat, and the named
fallback where a Hessian cannot be factored."""

from __future__ import annotations

import torch

from llmc.compress.quantize.scales import search
from llmc.grids import Grid, QuantizedTensor


def rtn(weight: torch.Tensor, grid: Grid) -> QuantizedTensor:
    """Quantise `weight` float32 [out, in]; the scale of a group minimises the squared error over its columns."""
    w = weight.t().contiguous()
    scales = search(w, torch.eye(w.shape[0], device=w.device), None, grid)
    codes = scales.nearest(w)
    return QuantizedTensor(grid, codes.t().to(torch.uint8).contiguous(), scales.stored(), scales.stored_zeros())
