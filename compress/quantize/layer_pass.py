"""Quantization as a pass of the calibration loop. It changes one group of linears at a time and records each layer."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from llmc.compress.imatrix.importance import Importance
from llmc.compress.layer_run import InputStatistics
from llmc.compress.passes import LayerPass
from llmc.compress.quantize.assignment import Assignment
from llmc.compress.quantize.carried import CARRIED
from llmc.compress.quantize.gptq import compensate, gptq
from llmc.compress.skeleton import LinearGroup, Skeleton
from llmc.console import warn
from llmc.formats.linears import get_weight, set_weight
from llmc.formats.quantized import Quantized, as_blocks, encode, rows_of, tensors_of, with_tensors
from llmc.formats.types import AnyType
from llmc.rounding import lattice
from llmc.rounding.lattice import Found
from llmc.rounding.rtn import rtn
from llmc.rounding.search import objective


class QuantizePass(LayerPass):
    """Quantizes every group of linears: with text by GPTQ, without text by rounding to nearest. A layer's tensors have the
    checkpoint's format.

    assignment: the type of every linear.  importance: weights of the columns for rounding to nearest.
    masked: weights that are zero stay zero. (Rounding to nearest always keeps them, on types with a code for zero.)
    carry: blocks that lie on their linear's type keep their codes; only the others are rounded.

    A layer's record: {'layer', 'error' (lost share of the output energy of all linears), 'events' [sentences],
    'linears': {name: {'type', 'error', 'method' ('gptq' | 'rtn' | 'carried'), 'damp', 'dead_columns', 'tokens_per_column',
    'shrunk' (share, see shrinkage.py), 'sha256', 'carried' {'blocks', 'carried'} if blocks lie on the type}}}.
    """

    def __init__(self, skeleton: Skeleton, assignment: Assignment, damp: float, importance: Importance | None = None,
                 masked: bool = False, carry: bool = True) -> None:
        self.skeleton, self.assignment, self.damp, self.importance = skeleton, assignment, damp, importance
        self.masked, self.carry = masked, carry

    def begin(self, index: int, layer: nn.Module, groups: list[LinearGroup]) -> None:
        self.prefix = self.skeleton.layer_name(index)
        self.quantized: dict[str, Quantized] = {}
        self.linears: dict[str, dict[str, Any]] = {}
        self.events: list[str] = []
        self.lost = self.energy = 0.0

    def change(self, layer: nn.Module, group: LinearGroup, statistics: InputStatistics | None) -> None:
        """Quantize the group's linears, which share the Hessian. Linears of one type are stacked (rows are independent)."""
        group = replace(group, names=tuple(n for n in group.names if f"{self.prefix}.{n}" in self.assignment.types))
        self.found = {n: self._on_its_type(n, layer.get_submodule(n)) for n in group.names}
        for name, found in self.found.items():
            if found is not None and found.whole:
                self._carry(name, layer.get_submodule(name), found, statistics)
        group = replace(group, names=tuple(n for n in group.names if n not in self.quantized))
        if not group.names:  # kept as floats, or carried over
            return
        if statistics is None:
            for name in group.names:
                self._round(name, layer.get_submodule(name))
            return
        weights = {n: get_weight(layer.get_submodule(n)) for n in group.names}
        target = torch.cat(list(weights.values()))
        share = statistics.variation.share(statistics.hessian) if statistics.variation else 0.0
        if statistics.drift is not None and statistics.drift_hessian is not None:
            moved = compensate(target, statistics.drift_hessian, statistics.drift)
            statistics.drift = statistics.drift_hessian = None  # large, and no longer needed
            if moved is None:
                self._note(f"{', '.join(group.names)}: the errors of earlier layers could not be compensated")
            else:
                target = moved
        targets = dict(zip(group.names, target.split([len(w) for w in weights.values()]), strict=True))
        by_type: dict[AnyType, list[str]] = {}
        for name in group.names:
            by_type.setdefault(self._type(name), []).append(name)
        for qtype, names in by_type.items():
            self._stacked(layer, qtype, {n: targets[n] for n in names}, statistics.hessian, share,
                          statistics.tokens / group.in_features)

    def _stacked(self, layer: nn.Module, qtype: AnyType, targets: dict[str, torch.Tensor], hessian: torch.Tensor,
                 share: float, tokens_per_column: float) -> None:
        """Run GPTQ on linears with the same input and type. targets: the weights to quantize, [out, in].  share: by which
        the Hessian is shrunk."""
        keep = torch.cat([get_weight(layer.get_submodule(n)) != 0 for n in targets]) if self.masked else None
        some = [self.found[n] or Found.none_of(t.shape, qtype, t.device) for n, t in targets.items()
                if any(self.found[n] for n in targets)]
        result = gptq(torch.cat(list(targets.values())), hessian, qtype, self.damp, keep=keep,
                      found=lattice.stacked(some) if some else None, share=share)
        for event in result.events:
            self._note(f"{next(iter(targets))}: {event}")
        if result.weight is None:
            self._note(f"{', '.join(targets)}: rounded to nearest, because no damping made the Hessian invertible")
        row = 0
        for name, target in targets.items():
            rows = slice(row, row := row + target.shape[0])
            linear = layer.get_submodule(name)
            if result.weight is None:
                q, method = self._nearest(name, linear), "rtn"
                error = objective((q.dequantize() - target).t(), hessian)
            else:
                q, method, error = rows_of(result.weight, rows), "gptq", result.error[rows]
            lost, energy = float(error.double().sum()), float(result.energy[rows].double().sum())
            self._keep(name, linear, q, lost, energy, method=method, damp=result.damp, dead_columns=result.dead,
                       tokens_per_column=round(tokens_per_column, 2), shrunk=round(share, 4))

    def _round(self, name: str, linear: nn.Module) -> None:
        """Round one linear to nearest. Its error is the squared error relative to the squared weights, both weighted by the
        importance if it is known."""
        counts, record = self._importance(name)
        q = self._nearest(name, linear, counts)
        self._keep(name, linear, q, *_squares(q, get_weight(linear), counts), method="rtn", **record)

    def _nearest(self, name: str, linear: nn.Module, counts: torch.Tensor | None = None) -> Quantized:
        """Round a linear to nearest, except the blocks that lie on its type."""
        q, found = rtn(get_weight(linear), self._type(name), counts), self.found[name]
        return q if found is None else found.over(q)

    def _on_its_type(self, name: str, linear: nn.Module) -> Found | None:
        return lattice.find(get_weight(linear), self._type(name)) if self.carry else None

    def _carry(self, name: str, linear: nn.Module, found: Found, statistics: InputStatistics | None) -> None:
        """Store the codes of a linear that lies on its type. Its error is that of the type in which its values were stored:
        bfloat16 holds d * level to 3 digits."""
        q, weight = found.tensor, get_weight(linear)
        if statistics is None:
            self._keep(name, linear, q, *_squares(q, weight, None), method=CARRIED)
            return
        lost, energy = (float(objective(x.t(), statistics.hessian).double().sum()) for x in (q.dequantize() - weight, weight))
        self._keep(name, linear, q, max(0.0, lost), energy, method=CARRIED)

    def _importance(self, name: str) -> tuple[torch.Tensor | None, dict[str, Any]]:
        """Returns (the importance of the columns of a linear, entries for its record). As in GPTQ, a column whose input was
        always zero gets the mean: the text never used it."""
        if self.importance is None:
            return None, {}
        counts = self.importance.of(f"{self.prefix}.{name}")
        if counts is None:
            self._note(f"{name}: the importance matrix saw no input but zero, so all columns have the same importance")
            return None, {}
        dead = counts == 0
        return torch.where(dead, counts.mean(), counts), {"dead_columns": int(dead.sum())}

    def _type(self, name: str) -> AnyType:
        return self.assignment.types[f"{self.prefix}.{name}"]

    def finish(self, index: int, layer: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        tensors = {}
        for name, q in self.quantized.items():
            stored = self.skeleton.names.stored(f"{self.prefix}.{name}.weight")
            for part, tensor in encode(q).items():
                tensors[f"{stored.removesuffix('.weight')}.{part}"] = tensor
        error = self.lost / self.energy if self.energy else 0.0
        return tensors, {"layer": index, "error": error, "events": self.events, "linears": self.linears}

    def _keep(self, name: str, linear: nn.Module, q: Quantized, lost: float, energy: float, **record: Any) -> None:
        """Store the quantized weight and set its values in the layer, so that later layers see its error."""
        value = q.dequantize()
        if self.masked and bool((value[get_weight(linear) == 0] != 0).any()):
            raise RuntimeError(f"{self.prefix}.{name}: a pruned weight is not zero on {q.type.name}")
        set_weight(linear, value)
        cpu = with_tensors(q, {field: tensor.cpu() for field, tensor in tensors_of(q).items()})
        if not self.assignment.portable:
            cpu = as_blocks(cpu)
        self.quantized[name] = cpu
        error = lost / energy if energy else 0.0
        if (found := self.found[name]) is not None:
            record["carried"] = {"blocks": found.lies.numel(), "carried": int(found.lies.sum())}
        self.linears[name] = {"type": cpu.type.name, "error": error, **record, "sha256": digest(cpu)}
        self.lost += lost
        self.energy += energy

    def _note(self, event: str) -> None:
        self.events.append(event)
        warn(f"{self.prefix}.{event}")


def _squares(q: Quantized, weight: torch.Tensor, counts: torch.Tensor | None) -> tuple[float, float]:
    """The squared error of q [out, in], and the squared weights, both with the columns weighted by `counts` [in]."""
    by = 1.0 if counts is None else counts.to(weight.device)
    return float(((q.dequantize() - weight).square() * by).sum()), float((weight.square() * by).sum())


def digest(q: Quantized) -> str:
    """sha256 over the stored tensors in the checkpoint's format, in the order of their names."""
    h = hashlib.sha256()
    for _, tensor in sorted(encode(q).items()):
        h.update(tensor.contiguous().numpy().tobytes())
    return h.hexdigest()
