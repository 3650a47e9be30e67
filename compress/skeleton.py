"""A model without weights in memory: built on the meta device, and filled one decoder layer at a time.

This module does not depend on the architecture. The decoder layers are the module list that is as long as the text config
says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from llmc.errors import UserError
from llmc.formats import contents, quantized
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.ends import Ends, ends_of
from llmc.formats.hf import empty_model, load_config
from llmc.formats.linears import around, find_layers, get_weight, is_linear
from llmc.formats.names import missing
from llmc.formats.weights import Weights


@dataclass(frozen=True)
class LinearGroup:
    """Linears (names inside the layer) that read the same input of width `in_features`, in the order in which they run."""

    names: tuple[str, ...]
    in_features: int


EXPERTS = re.compile(r"(?:^|[._])(?:experts?|moe)(?:[._]|$)")  # in the names of a mixture of experts


class StopForward(Exception):  # noqa: N818 - not an error
    """Raised by a hook to end a forward pass when the rest is not needed."""


class Skeleton:
    """The model of a checkpoint on the meta device. The caller loads and frees its parts."""

    def __init__(self, checkpoint: Checkpoint, device: str) -> None:
        self.checkpoint, self.device = checkpoint, torch.device(device)
        self.config = load_config(checkpoint.folder)
        self.model = empty_model(self.config)
        self.weights = Weights(checkpoint, self.model, device)
        self.names, self.load, self.free, self.filled = (
            self.weights.names, self.weights.load, self.weights.free, self.weights.filled)
        self.layers_name, self.layers = find_layers(self.model)
        # {name of a module of experts: the module}
        self.experts = {f"{self.layers_name}.{n}": m for n, m in self.weights.unfuse(self.layers, self.layers_name).items()}
        self.kept: frozenset[str] = frozenset()  # linears that no pass changes (coverage.py)
        self._check_layers()
        self.ends: Ends = ends_of(checkpoint, self.model, self.names)[0]
        self._check_unread({part for linear in quantized.linears(checkpoint) for part in quantized.parts(linear)})

    def _check_layers(self) -> None:
        """Raise UserError if the checkpoint lacks a parameter of a decoder layer."""
        lacking = [f"{self.layers_name}.{n}" for n, _ in self.layers.named_parameters()
                   if self.names.locate(f"{self.layers_name}.{n}") is None]
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        if shared := [n for n in lacking if n in tied]:
            raise UserError(f"layers of {self.checkpoint.folder} share weights ({shared[0]} is {tied[shared[0]]}), and llmc "
                            "changes the weights of one layer at a time", "give another model; `llmc eval` runs this one")
        if lacking:
            raise missing(self.checkpoint.folder, *lacking)

    def _check_unread(self, codes: set[str]) -> None:
        known = {name for name, _ in self.model.named_buffers()}
        unread = [n for n in self.checkpoint.names() if n not in codes and n != self.ends.head and n not in known
                  and self.names.find_own(n) is None]
        contents.check_unread(self.checkpoint, unread, "are left as they are")

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Inside, one decoder layer has its weights. They are freed at the end."""
        layer = self.layers[index]
        self.load(layer, self.layer_name(index))
        try:
            yield layer
        finally:
            self.free(layer)

    def layer_name(self, index: int) -> str:
        return f"{self.layers_name}.{index}"

    @cached_property
    def shapes(self) -> list[list[tuple[int, int]]]:
        """[out, in] of the linears of each layer. The layers of a hybrid model differ."""
        weights = [[get_weight(m) for m in self.linears(i).values()] for i in range(len(self.layers))]
        return [[(w.shape[0], w.shape[1]) for w in layer] for layer in weights]

    @property
    def layer_weights(self) -> int:
        """The number of weights in the linears of the largest layer."""
        return max(sum(rows * width for rows, width in layer) for layer in self.shapes)

    @property
    def widths(self) -> list[int]:
        """The lengths of the linears' rows, ascending."""
        return sorted({width for layer in self.shapes for _, width in layer})

    def linears(self, index: int) -> dict[str, nn.Module]:
        """{name inside the layer: linear} of a decoder layer."""
        return {n: m for n, m in self.layers[index].named_modules() if is_linear(m)}

    def starred(self, linear: str) -> str:
        """The model's name of a linear, with * for the number of its expert: all experts of a layer are one tensor in many
        files."""
        path = next((p for p in self.experts if linear.startswith(f"{p}.")), None)
        return linear if path is None else f"{path}.*.{linear.removeprefix(path).split('.', 2)[2]}"

    def expert_of(self, linear: str) -> tuple[int, int] | None:
        """(number, count) of the expert that a linear belongs to, by the linear's name in the model; None if to none."""
        path = next((p for p in self.experts if linear.startswith(f"{p}.")), None)
        return None if path is None else (int(linear.removeprefix(f"{path}.").split(".")[0]), self.experts[path].count)

    def is_another_expert(self, index: int, linear: str) -> bool:
        """Whether a linear of a layer belongs to an expert, and not to the first one."""
        name = f"{self.layer_name(index)}.{linear}"
        return self.starred(name) != name and self.starred(name).replace(".*.", ".0.") != name

    def leave(self) -> None:
        """Free the modules outside the layers (entering.py loads them)."""
        for part, _ in self.outside():
            self.free(part)

    def outside(self) -> list[tuple[nn.Module, str]]:
        """(module, name) of every module outside the decoder layers and the head that a text uses and that has parameters or
        buffers itself."""
        head = self.model.get_output_embeddings()
        return [(module, name) for name, module in around(self.model, self.layers_name) if module is not head]




def linears_of(skeleton: Skeleton) -> Iterator[tuple[int, str, torch.nn.Module]]:
    """(layer index, name in the model, module) of every linear in the decoder layers, without those that are kept."""
    for index in range(len(skeleton.layers)):
        for name, module in skeleton.linears(index).items():
            if (full := f"{skeleton.layer_name(index)}.{name}") not in skeleton.kept:
                yield index, full, module
