"""The kind of a norm, measured: classes of transformers have many names, and some do not tell their epsilon."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

SMALL = 1e-3  # the size of an input whose square is near an epsilon


@dataclass(frozen=True)
class Norm:
    """centred: it subtracts the mean (LayerNorm).  epsilon: added to the variance, or to the mean square."""

    centred: bool
    epsilon: float


def norm_of(module: Any, width: int) -> Norm:
    """The kind of a norm over `width` channels, from what it computes."""
    x = torch.linspace(-1.0, 2.0, width)[None]
    plain, moved = _linear(module, x), _linear(module, x + 5)
    centred = bool(torch.allclose(plain, moved, atol=1e-3))
    stated = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if isinstance(stated, float):
        return Norm(centred, stated)
    power = float(x.var(correction=0) if centred else x.square().mean()) * SMALL**2
    ratio = float((_linear(module, SMALL * x).norm() / plain.norm()).double())
    return Norm(centred, float(f"{power * (ratio**-2 - 1):.1e}"))


def _linear(module: Any, x: torch.Tensor) -> torch.Tensor:
    """The part of the module's output that depends on the sign of x: without the bias."""
    return (module(x) - module(-x)) / 2
