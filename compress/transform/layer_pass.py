"""Transforms as passes of the calibration loop.

A pass changes a decoder layer in memory, checks that its output stays the same, and returns the changed tensors in a
precision that holds them exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from llmc.compress.arguments import LayerArguments
from llmc.compress.layer_run import InputStatistics
from llmc.compress.passes import LayerPass
from llmc.compress.skeleton import LinearGroup, Skeleton
from llmc.compress.tracing import states_of
from llmc.compress.transform.roles import Place, map_layer
from llmc.compress.transform.rotations import orthogonal, rotate_heads, rotate_stream
from llmc.compress.transform.scaling import (
    activation_factors,
    apply_scaling,
    equalizing_factors,
    int8_noise,
    search_alpha,
    smoothing_factors,
    some_rows,
    writer_size,
)
from llmc.formats.linears import get_weight
from llmc.formats.mixture import Experts
from llmc.formats.types import AnyType

PROOF_TOKENS = 32
MOST_REROUTED = 4  # tokens that may go to another expert, of PROOF_TOKENS
TOLERANCE = 1e-3  # of the largest output; float32 gives about 1e-6


class Transform(LayerPass):
    """A pass that checks for each layer that its output stays the same.

    arguments: the keyword arguments that the model passes to each layer for PROOF_TOKENS tokens (Skeleton.enter).
    stream: R1 [hidden, hidden] float64, if the layer's input and output are rotated; else None.
    """

    def __init__(self, skeleton: Skeleton, arguments: list[LayerArguments], stream: torch.Tensor | None = None) -> None:
        self.skeleton, self.arguments, self.stream = skeleton, arguments, stream

    def begin(self, index: int, layer: nn.Module, groups: list[LinearGroup]) -> None:
        self.index, self.map = index, map_layer(self.skeleton.config, layer)
        self.prefix = self.skeleton.layer_name(index)
        self.kept: dict[str, torch.Tensor] = {}  # changed matrices of experts, by their parameters, each [out, in]
        self.skeleton.weights.values = lambda name, _module: self.kept.get(name)
        self.places: dict[str, dict[str, float]] = {}
        width = self.skeleton.config.get_text_config().hidden_size
        generator = torch.Generator().manual_seed(index)
        self.noise = torch.randn(1, PROOF_TOKENS, width, generator=generator).to(self.skeleton.device)
        self.expected, self.routed = self._run(layer, self.noise)

    def finish(self, index: int, layer: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Returns (the tensors that changed, by their stored names; the record {'layer', 'proof' (largest difference of the
        layer's output, relative to its largest value), 'places', 'left'}). RuntimeError if the output changed."""
        states, expected = self.noise, self.expected
        if self.stream is not None:
            r = self.stream.to(states.device)
            states, expected = (states.double() @ r).float(), (expected.double() @ r).float()
        found, routed = self._run(layer, states)
        same = self._routed_alike(routed)
        difference = float((found - expected)[..., same, :].abs().max() / expected.abs().max())
        if not difference < TOLERANCE:
            raise RuntimeError(f"the transform changed the output of {self.prefix}: relative difference {difference:.2g}")
        changed = self._changed(layer)
        self.skeleton.weights.values = None
        return changed, {"layer": index, "proof": difference, "places": self.places, "left": self.left()}

    def left(self) -> list[str]:
        """The channels that were not transformed, each with the reason."""
        return []

    def _run(self, layer: nn.Module, states: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The layer's output, and of each module of experts the sorted numbers of each token's experts [tokens, chosen]."""
        routed: list[torch.Tensor] = []
        handles = [m.routed.register_forward_pre_hook(lambda _m, args: routed.append(args[1].sort(-1).values.cpu()))
                   for m in layer.modules() if isinstance(m, Experts)]
        try:
            with torch.no_grad():
                return states_of(layer(states, **self.arguments[self.index].of(0, len(states)))), routed
        finally:
            for handle in handles:
                handle.remove()

    def _routed_alike(self, routed: list[torch.Tensor]) -> torch.Tensor:
        """bool [tokens]: the tokens that go to the same experts as before. Where two experts are nearly equal, the last bit
        may choose the other one. RuntimeError if this happens to more than a few tokens."""
        same = torch.ones(PROOF_TOKENS, dtype=torch.bool)
        for before, after in zip(self.routed, routed, strict=True):
            same &= (before == after).all(-1)
        if int((~same).sum()) > MOST_REROUTED:
            raise RuntimeError(f"the transform sends {int((~same).sum())} of {PROOF_TOKENS} tokens of {self.prefix} to other "
                               "experts")
        return same

    @contextmanager
    def reading(self, layer: nn.Module, name: str) -> Iterator[nn.Module]:
        """Inside, a linear of the layer has its weights."""
        linear = layer.get_submodule(name)
        with self.skeleton.filled([linear]):
            yield linear

    @contextmanager
    def changing(self, layer: nn.Module, name: str) -> Iterator[nn.Module]:
        """Inside, a linear of the layer has its weights. Those of an expert are kept at the end, because it is freed."""
        with self.reading(layer, name) as linear:
            yield linear
            if self.skeleton.expert_of(f"{self.prefix}.{name}") is not None:
                full = f"{self.prefix}.{name}.weight"
                self.kept[full] = as_stored(get_weight(linear).detach().cpu().clone(), self.skeleton.weights.dtype(full))

    def _changed(self, layer: nn.Module) -> dict[str, torch.Tensor]:
        found = {}
        for name, p in layer.named_parameters():
            if p.device.type == "meta":  # of an expert
                continue
            stored = self.skeleton.names.stored(f"{self.skeleton.layer_name(self.index)}.{name}")
            before = self.skeleton.checkpoint.tensor(stored)
            value = p.detach().cpu()
            if not torch.equal(value, before.float()):
                found[stored] = as_stored(value, before.dtype)
        return found | self._stacked_alike()

    def _stacked_alike(self) -> dict[str, torch.Tensor]:
        """The changed matrices of experts by their stored names. Those of one tensor get one type."""
        locate, weights = self.skeleton.names.locate, self.skeleton.weights
        wide = {place.name for n, t in self.kept.items() if (place := locate(n)) and t.dtype != weights.dtype(n)}
        return weights.pack({n: t.float() if (place := locate(n)) and place.name in wide else t
                             for n, t in self.kept.items()})


class Rotation(Transform):
    """R2 on every layer, and R1 too if `stream` is given. seed: each layer's R2 is drawn from it and the layer's index.

    A rotation changes the whole layer, so `begin` does it and there are no groups.
    """

    def __init__(self, skeleton: Skeleton, arguments: list[LayerArguments], seed: int, stream: torch.Tensor | None) -> None:
        super().__init__(skeleton, arguments, stream)
        self.seed = seed

    def begin(self, index: int, layer: nn.Module, groups: list[LinearGroup]) -> None:
        super().begin(index, layer, groups)
        if self.stream is not None:
            rotate_stream(layer, self.map, self.stream, self.changing)
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.index)
        rotate_heads(layer, self.map.value, self.map.heads, orthogonal(self.map.heads.width, generator))

    def groups(self, layer: nn.Module) -> list[LinearGroup]:
        return []

    def change(self, layer: nn.Module, group: LinearGroup, statistics: InputStatistics | None) -> None:
        """Does nothing: `begin` has rotated the layer."""


class Scaling(Transform):
    """Channel scalings for the target type: AWQ's with text, equalization without text; or SmoothQuant's with alpha =
    `smooth`.

    type_of: from the width of a row to the target type.
    A record's 'places': {name: {'alpha', 'before', 'after'}}. 'before' and 'after' are the readers' rounding error as a share
    of their output energy, with alpha = 0 and with the chosen alpha, under the statistics of the search. For SmoothQuant they
    are the error bound of 8-bit inputs (scaling.int8_noise), relative to 'before' = 1.
    """

    def __init__(self, skeleton: Skeleton, arguments: list[LayerArguments], type_of: Callable[[int], AnyType],
                 smooth: float | None = None, without_text: bool = False) -> None:
        super().__init__(skeleton, arguments)
        self.type_of, self.smooth, self.without_text = type_of, smooth, without_text

    def begin(self, index: int, layer: nn.Module, groups: list[LinearGroup]) -> None:
        super().begin(index, layer, groups)
        self.routed_input: InputStatistics | None = None

    def groups(self, layer: nn.Module) -> list[LinearGroup]:
        """One group for each place: its readers. The norm before experts comes at the end (`finish`)."""
        return [LinearGroup(p.readers, len(p.columns)) for p in map_layer(self.skeleton.config, layer).places
                if not self._has_experts(layer, p)]

    def change(self, layer: nn.Module, group: LinearGroup, statistics: InputStatistics | None) -> None:
        for place in self.map.places:
            if set(place.readers) == set(group.names):
                self._place(layer, place, statistics)
            elif statistics is not None and set(group.names) < set(place.readers) and self._has_experts(layer, place):
                self._gather(group, statistics)

    def finish(self, index: int, layer: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Scale what the experts read. A scaling keeps their outputs, so it may come after the layer has run."""
        for place in self.map.places:
            if place.name not in self.places and self._has_experts(layer, place) and (
                    self.without_text or self.routed_input is not None):
                self._place(layer, place, self.routed_input)
        return super().finish(index, layer)

    def _place(self, layer: nn.Module, place: Place, statistics: InputStatistics | None) -> None:
        if statistics is None:
            self._equalize(layer, place)
        elif self.smooth is not None:
            assert statistics.peak is not None  # the loop's settings request it
            self._migrate(layer, place, statistics.peak, self.smooth)
        else:
            s = activation_factors(statistics.hessian.diagonal(), place)
            self._scale(layer, place, s, statistics.hessian)

    def _has_experts(self, layer: nn.Module, place: Place) -> bool:
        """Whether a norm is read by experts: they share one scaling."""
        return place.rows is None and any(isinstance(layer.get_submodule(r.rpartition(".")[0].rpartition(".")[0]), Experts)
                                          for r in place.readers if r.count(".") > 1)

    def _gather(self, group: LinearGroup, statistics: InputStatistics) -> None:
        """Add the statistics of one expert, or of linears beside the experts, to those of their common input: the error of a
        layer is the sum of its experts' errors, each under its own Hessian."""
        found = self.routed_input
        if found is None:
            peak = None if statistics.peak is None else statistics.peak.clone()
            self.routed_input = InputStatistics(statistics.hessian.clone(), statistics.tokens, peak=peak)
            return
        found.hessian += statistics.hessian
        found.tokens += statistics.tokens
        if found.peak is not None and statistics.peak is not None:
            found.peak = torch.maximum(found.peak, statistics.peak)

    def _equalize(self, layer: nn.Module, place: Place) -> None:
        offset = self.map.family.offset
        s = equalizing_factors(layer, place, offset, self.reading)
        moments = writer_size(layer, place, offset, "rms", self.reading).square()[place.columns]
        self._scale(layer, place, s, moments.float().to(self.skeleton.device).diag())

    def _migrate(self, layer: nn.Module, place: Place, peak: torch.Tensor, alpha: float) -> None:
        s = smoothing_factors(peak, layer, place, alpha, self.reading)
        noise = [int8_noise(peak, layer, place, factors, self.reading) for factors in (torch.ones_like(s), s)]
        self.places[place.name] = {"alpha": alpha, "before": 1.0, "after": noise[1] / (noise[0] or 1.0)}
        apply_scaling(layer, place, s, self.map.family.offset, self.changing)

    def _scale(self, layer: nn.Module, place: Place, s: torch.Tensor, hessian: torch.Tensor) -> None:
        weight = some_rows(layer, place, self.reading)
        alpha, errors = search_alpha(weight, hessian, s[place.columns], self.type_of(weight.shape[1]))
        self.places[place.name] = {"alpha": alpha, "before": errors[0.0], "after": errors[alpha]}
        if alpha:
            apply_scaling(layer, place, s**alpha, self.map.family.offset, self.changing)

    def left(self) -> list[str]:
        missed = [p.name for p in self.map.places if p.name not in self.places]
        return [*self.map.left, *(f"{name}: its readers do not share one input" for name in missed)]


def as_stored(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns a changed float32 tensor in the source's dtype if that holds it exactly, else in float32. Rounding it again
    would change the logits as much as the source's own rounding did."""
    narrow = value.to(dtype)
    return narrow if torch.equal(narrow.float(), value) else value
