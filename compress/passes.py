"""What the calibration loop asks of a pass: a class that changes the weights of decoder layers, or only looks at them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn

from llmc.compress.layer_run import InputStatistics
from llmc.compress.skeleton import LinearGroup, get_weight, is_linear


class LayerWork(ABC):
    """What every pass has. One layer is begun, worked on and finished before the next one begins."""

    @abstractmethod
    def begin(self, index: int, layer: nn.Module, groups: list[LinearGroup]) -> None:
        """A layer is in memory; `groups` are all of its linears that will be come to. Raise UserError if the pass cannot
        serve it."""

    @abstractmethod
    def finish(self, index: int, layer: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """(tensors to keep, by their names in the output checkpoint; what to record about the layer)."""


class LayerPass(LayerWork):
    """A pass that changes weights."""

    @abstractmethod
    def change(self, layer: nn.Module, group: LinearGroup, statistics: InputStatistics | None) -> None:
        """Change the weights of the group's linears in place. statistics: of their input; None where no text is run."""

    def groups(self, layer: nn.Module) -> list[LinearGroup]:
        """What `change` is called with where no text is run, in this order: every linear by itself."""
        return [LinearGroup((n,), get_weight(m).shape[1]) for n, m in layer.named_modules() if is_linear(m)]


class LayerWatch(LayerWork):
    """A pass that changes nothing. It needs text."""

    @abstractmethod
    def see(self, group: LinearGroup, inputs: torch.Tensor) -> None:
        """One batch [n, seq_len, in] of what the group's linears are given, as it is."""
