"""The factors of a type before any code is chosen, and the error that all searches measure."""

from __future__ import annotations

import torch

from llmc.formats.types import AnyType, IntegerType
from llmc.rounding.block_factors import search_blocks
from llmc.rounding.scales import Factors, search


def search_factors(w: torch.Tensor, hessian: torch.Tensor, factor: torch.Tensor | None, qtype: AnyType) -> Factors:
    """The factors of `type` for w [in, out] before any code is chosen."""
    return search(w, hessian, factor, qtype) if isinstance(qtype, IntegerType) else search_blocks(w, hessian, factor, qtype)


def objective(delta: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """float32 [out]: d H d^T for each column d of delta [in, out]."""
    return (hessian @ delta).mul_(delta).sum(0)
