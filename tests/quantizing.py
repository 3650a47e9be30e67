"""What the tests of quantization share: a short calibration, and a weight with the Hessian of its inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llmc.compress.quantize.config import QuantizeConfig


def settings(text: Path, out: Path, **values: Any) -> QuantizeConfig:
    """A short calibration."""
    return QuantizeConfig(**{"calibration": str(text), "samples": 24, "seq_len": 64, "threads": 2, "out": out, **values})


def problem(out: int, n: int, seed: int = 0, tokens: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [out, n] and the Hessian of correlated inputs of very unequal size."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, n, generator=g) @ torch.randn(n, n, generator=g) * torch.rand(n, generator=g)
    return torch.randn(out, n, generator=g), x.t() @ x


def lost(q: torch.Tensor, w: torch.Tensor, h: torch.Tensor) -> float:
    """What q instead of w loses on inputs whose Hessian is h: the trace of (q - w) h (q - w)'."""
    d = (q - w).double()
    return float(((d @ h.double()) * d).sum())
