"""The zeros of a pruned student stay zeros: its gradients are masked, and its weights are masked after each step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from llmc.formats.linears import find_layers, is_linear


class Masks:
    """kept: for each parameter a bool tensor of its shape, True where the weight is not zero."""

    def __init__(self, kept: dict[nn.Parameter, torch.Tensor]) -> None:
        self.kept = kept

    @property
    def zeros(self) -> int:
        return sum(int(kept.numel() - kept.sum()) for kept in self.kept.values())

    def mask_gradients(self) -> None:
        for p, kept in self.kept.items():
            if p.grad is not None:
                p.grad.mul_(kept)

    @torch.no_grad()
    def apply(self) -> None:
        for p, kept in self.kept.items():
            p.mul_(kept)


def masks_of(model: Any) -> Masks:
    """The masks of every linear in the decoder layers that has at least one weight of exactly zero."""
    _, layers = find_layers(model)
    weights = [p for layer in layers for m in layer.modules() if is_linear(m) for p in m.parameters() if p.dim() == 2]
    return Masks({w: w.detach() != 0 for w in weights if bool((w.detach() == 0).any())})
