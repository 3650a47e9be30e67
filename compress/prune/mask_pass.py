"""Pruning to a mask as a pass of the calibration loop. It changes one group of linears at a time and records each layer."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from llmc.compress.layer_run import InputStatistics
from llmc.compress.passes import LayerPass
from llmc.compress.prune.config import PruneConfig
from llmc.compress.prune.masks import magnitude_mask, wanda_mask
from llmc.compress.prune.sparsegpt import reconstruct, sweep
from llmc.compress.quantize.gptq import compensate, damped
from llmc.compress.skeleton import LinearGroup, Skeleton
from llmc.console import warn
from llmc.formats.linears import get_weight, set_weight
from llmc.rounding.search import objective


class MaskPass(LayerPass):
    """Sets weights of every linear to zero by the config's method; if no text is run, by magnitude. The weights that stay are
    rounded to the type that the source stores, and the layer runs with the rounded ones.

    A layer's record: {'layer', 'error' (lost share of the output energy of all linears; without text, of the squared
    weights), 'sparsity', 'events' [sentences], 'linears': {name: {'method', 'sparsity', 'error', 'sha256', …}}}.
    """

    def __init__(self, skeleton: Skeleton, config: PruneConfig) -> None:
        self.skeleton, self.config = skeleton, config

    def begin(self, index: int, layer: nn.Module, groups: list[LinearGroup]) -> None:
        self.prefix = self.skeleton.layer_name(index)
        self.linears: dict[str, dict[str, Any]] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        self.events: list[str] = []
        self.lost = self.energy = 0.0

    def change(self, layer: nn.Module, group: LinearGroup, statistics: InputStatistics | None) -> None:
        """Prune the group's linears one by one, each to the same share of zeros. They share the Hessian and its factor."""
        if statistics is None:
            for name in group.names:
                self._by_size(name, layer.get_submodule(name))
            return
        hessian, linears = statistics.hessian, {n: layer.get_submodule(n) for n in group.names}
        squares = hessian.diagonal().clone()  # the Hessian is damped in place
        record = {"dead_columns": int((squares == 0).sum()),
                  "tokens_per_column": round(statistics.tokens / group.in_features, 2)}
        targets = {n: get_weight(m).clone() for n, m in linears.items()}
        found = None
        if self.config.method == "sparsegpt":
            targets = self._compensated(targets, statistics)
            found = damped(hessian, self.config.damp, by_use=False)
            for event in found.events:
                self._note(f"{group.names[0]}: {event}")
            if found.factor is None:
                self._note(f"{', '.join(linears)}: pruned by Wanda, because no damping made the Hessian invertible")
        for name, target in targets.items():
            linear = linears[name]
            if found is None or found.factor is None:
                weight = get_weight(linear)
                keep = wanda_mask(weight, squares, self.config.share, self.config.pattern)
                self._keep(name, linear, weight * keep, method="wanda", **record)
            else:
                goal = target.t().contiguous()
                w = goal.clone()
                keep = sweep(w, found.factor, self.config.share, self.config.pattern)
                w = reconstruct(w, goal, keep, hessian)
                self._keep(name, linear, w.t(), method="sparsegpt", damp=found.damp, **record)
            damped_squares = hessian.diagonal().clone()
            hessian.diagonal().copy_(squares)  # what is reported is not damped
            lost, energy = (max(0.0, float(objective(w.t().contiguous(), hessian).double().sum()))
                            for w in (get_weight(linear) - target, target))
            hessian.diagonal().copy_(damped_squares)
            self._add(name, lost, energy)

    def _compensated(self, targets: dict[str, torch.Tensor], statistics: InputStatistics) -> dict[str, torch.Tensor]:
        """The weights [out, in] that compensate the errors of the layers before this one."""
        if statistics.drift is None or statistics.drift_hessian is None:
            return targets
        moved = compensate(torch.cat(list(targets.values())), statistics.drift_hessian, statistics.drift)
        statistics.drift = statistics.drift_hessian = None  # large, and no longer needed
        if moved is None:
            self._note(f"{', '.join(targets)}: the errors of earlier layers could not be compensated")
            return targets
        return dict(zip(targets, moved.split([len(w) for w in targets.values()]), strict=True))

    def _by_size(self, name: str, linear: nn.Module) -> None:
        """Prune one linear by the magnitude of its weights."""
        weight = get_weight(linear).clone()
        self._keep(name, linear, weight * magnitude_mask(weight, self.config.share, self.config.pattern), method="magnitude")
        lost = float((get_weight(linear) - weight).double().square().sum())
        self._add(name, lost, float(weight.double().square().sum()))

    def finish(self, index: int, layer: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        weights = sum(t.numel() for t in self.tensors.values())
        zeros = sum(int((t == 0).sum()) for t in self.tensors.values())
        record = {"layer": index, "error": self.lost / self.energy if self.energy else 0.0,
                  "sparsity": zeros / weights, "events": self.events, "linears": self.linears}
        return self.skeleton.weights.pack(self.tensors), record

    def _keep(self, name: str, linear: nn.Module, weight: torch.Tensor, **record: Any) -> None:
        """Round the weight [out, in] to the stored type and set it in the layer."""
        parameter = f"{self.prefix}.{name}.weight"
        set_weight(linear, weight)
        assert isinstance(linear.weight.data, torch.Tensor)
        tensor = linear.weight.data.to(self.skeleton.weights.dtype(parameter)).cpu().contiguous()
        tensor[tensor == 0] = 0  # replaces -0, whose bits are not all zero
        linear.weight.data.copy_(tensor)
        self.tensors[parameter] = tensor
        self.linears[name] = {**record, "sparsity": float((tensor == 0).double().mean()), "sha256": digest(tensor)}

    def _add(self, name: str, lost: float, energy: float) -> None:
        self.linears[name]["error"] = lost / energy if energy else 0.0
        self.lost += lost
        self.energy += energy

    def _note(self, event: str) -> None:
        self.events.append(event)
        warn(f"{self.prefix}.{event}")


def digest(tensor: torch.Tensor) -> str:
    """sha256 of a tensor's stored bytes."""
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
