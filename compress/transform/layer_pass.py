"""Transforms as passes of the calibration loop.

A pass changes a decoder layer in memory, checks that its output stays the same, and returns the changed tensors in a
precision that holds them exactly."""

from __future__ import annotations

from collections.abc import Callable
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
    writer_size,
)
from llmc.formats.linears import get_weight
from llmc.formats.types import AnyType

PROOF_TOKENS = 32
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
        self.places: dict[str, dict[str, float]] = {}
        width = self.skeleton.config.get_text_config().hidden_size
        generator = torch.Generator().manual_seed(index)
        self.noise = torch.randn(1, PROOF_TOKENS, width, generator=generator).to(self.skeleton.device)
        self.expected = self._run(layer, self.noise)

    def finish(self, index: int, layer: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Returns (the tensors that changed, by their stored names; the record {'layer', 'proof' (largest difference of the
        layer's output, relative to its largest value), 'places', 'left'}). RuntimeError if the output changed."""
        states, expected = self.noise, self.expected
        if self.stream is not None:
            r = self.stream.to(states.device)
            states, expected = (states.double() @ r).float(), (expected.double() @ r).float()
        difference = float((self._run(layer, states) - expected).abs().max() / expected.abs().max())
        if not difference < TOLERANCE:
            raise RuntimeError(f"the transform changed the output of {self.skeleton.layer_name(index)}: "
                               f"relative difference {difference:.2g}")
        return self._changed(layer), {"layer": index, "proof": difference, "places": self.places, "left": self.left()}

    def left(self) -> list[str]:
        """The channels that were not transformed, each with the reason."""
        return []

    def _run(self, layer: nn.Module, states: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return states_of(layer(states, **self.arguments[self.index].of(0, len(states))))

    def _changed(self, layer: nn.Module) -> dict[str, torch.Tensor]:
        found = {}
        for name, p in layer.named_parameters():
            stored = self.skeleton.names.stored(f"{self.skeleton.layer_name(self.index)}.{name}")
            before = self.skeleton.checkpoint.tensor(stored)
            value = p.detach().cpu()
            if not torch.equal(value, before.float()):
                found[stored] = as_stored(value, before.dtype)
        return found


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
            rotate_stream(layer, self.map, self.stream)
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
                 smooth: float | None = None) -> None:
        super().__init__(skeleton, arguments)
        self.type_of, self.smooth = type_of, smooth

    def groups(self, layer: nn.Module) -> list[LinearGroup]:
        """One group for each place: its readers."""
        return [LinearGroup(p.readers, len(p.columns)) for p in map_layer(self.skeleton.config, layer).places]

    def change(self, layer: nn.Module, group: LinearGroup, statistics: InputStatistics | None) -> None:
        for place in self.map.places:
            if set(place.readers) != set(group.names):
                continue
            if statistics is None:
                self._equalize(layer, place)
            elif self.smooth is not None:
                assert statistics.peak is not None  # the loop's settings request it
                self._migrate(layer, place, statistics.peak, self.smooth)
            else:
                s = activation_factors(statistics.hessian.diagonal(), place)
                self._scale(layer, place, s, statistics.hessian)

    def _equalize(self, layer: nn.Module, place: Place) -> None:
        offset = self.map.family.offset
        s = equalizing_factors(layer, place, offset)
        moments = writer_size(layer, place, offset, "rms").square()[place.columns]
        self._scale(layer, place, s, moments.float().to(self.skeleton.device).diag())

    def _migrate(self, layer: nn.Module, place: Place, peak: torch.Tensor, alpha: float) -> None:
        s = smoothing_factors(peak, layer, place, alpha)
        noise = [int8_noise(peak, layer, place, factors) for factors in (torch.ones_like(s), s)]
        self.places[place.name] = {"alpha": alpha, "before": 1.0, "after": noise[1] / (noise[0] or 1.0)}
        apply_scaling(layer, place, s, self.map.family.offset)

    def _scale(self, layer: nn.Module, place: Place, s: torch.Tensor, hessian: torch.Tensor) -> None:
        weight = torch.cat([get_weight(layer.get_submodule(n)) for n in place.readers])
        alpha, errors = search_alpha(weight, hessian, s[place.columns], self.type_of(weight.shape[1]))
        self.places[place.name] = {"alpha": alpha, "before": errors[0.0], "after": errors[alpha]}
        if alpha:
            apply_scaling(layer, place, s**alpha, self.map.family.offset)

    def left(self) -> list[str]:
        missed = [p.name for p in self.map.places if p.name not in self.places]
        return [*self.map.left, *(f"{name}: its readers do not share one input" for name in missed)]


def as_stored(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns a changed float32 tensor in the source's dtype if that holds it exactly, else in float32. Rounding it again
    would change the logits as much as the source's own rounding did."""
    narrow = value.to(dtype)
    return narrow if torch.equal(narrow.float(), value) else value
