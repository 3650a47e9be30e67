"""The search for the factors of any quantization type, and the error that all searches minimize."""

from __future__ import annotations

import torch

from llmc.formats.types import AnyType, IntegerType
from llmc.rounding.block_factors import search_blocks
from llmc.rounding.scales import Factors, search


def search_factors(w: torch.Tensor, hessian: torch.Tensor, factor: torch.Tensor | None, qtype: AnyType) -> Factors:
    """The best factors of `qtype` for w [in, out], found before GPTQ chooses codes."""
    return search(w, hessian, factor, qtype) if isinstance(qtype, IntegerType) else search_blocks(w, hessian, factor, qtype)


def objective(delta: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """The error of each output, float32 [out]: d H d^T for each column d of delta [in, out]."""
    return (hessian @ delta).mul_(delta).sum(0)
