"""The interface of passes in the calibration loop. A pass changes the weights of decoder layers, or only reads inputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn

from llmc.compress.layer_run import InputStatistics
from llmc.compress.skeleton import LinearGroup
from llmc.formats.linears import get_weight, is_linear


class LayerWork(ABC):
    """The methods of every pass. The loop begins, runs and finishes one layer before the next one begins."""

    @abstractmethod
    def begin(self, index: int, layer: nn.Module, groups: list[LinearGroup]) -> None:
        """Called when a layer is in memory. groups: all linears that the pass will get. Raise UserError if the pass cannot
        handle the layer."""

    @abstractmethod
    def finish(self, index: int, layer: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Returns (the tensors to store, by their names in the output checkpoint; the layer's record)."""


class LayerPass(LayerWork):
    """A pass that changes weights."""

    @abstractmethod
    def change(self, layer: nn.Module, group: LinearGroup, statistics: InputStatistics | None) -> None:
        """Change the weights of the group's linears in place. statistics: of their input; None if no text is run."""

    def groups(self, layer: nn.Module) -> list[LinearGroup]:
        """The groups that `change` gets if no text is run: one for every linear, in this order."""
        return [LinearGroup((n,), get_weight(m).shape[1]) for n, m in layer.named_modules() if is_linear(m)]


class LayerWatch(LayerWork):
    """A pass that changes nothing. It needs text."""

    @abstractmethod
    def see(self, group: LinearGroup, inputs: torch.Tensor) -> None:
        """Called with each input batch [n, seq_len, in] of the group's linears."""
