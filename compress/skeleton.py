"""A model without weights in memory: built on the meta device, and filled one decoder layer at a time.

This module does not depend on the architecture. The decoder layers are the module list that is as long as the text config
says. To find the linears of a layer that share an input, one sequence is run through it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from llmc.compress.arguments import LayerArguments, TextDependent
from llmc.errors import UserError
from llmc.formats import contents, quantized
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.ends import Ends, ends_of
from llmc.formats.hf import empty_model, load_config
from llmc.formats.linears import around, find_layers, is_linear
from llmc.formats.mixture import Experts
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
        self.weights.unfuse(self.layers, self.layers_name)
        self.kept: frozenset[str] = frozenset()  # linears that no pass changes (coverage.py)
        self._check_layers()
        self.ends: Ends = ends_of(checkpoint, self.model, self.names)[0]
        self._check_unread({part for linear in quantized.linears(checkpoint) for part in quantized.parts(linear)})

    def _check_layers(self) -> None:
        """Raise UserError if the checkpoint lacks a parameter of a decoder layer."""
        lacking = [f"{self.layers_name}.{n}" for n, _ in self.layers.named_parameters()
                   if self.names.locate(f"{self.layers_name}.{n}") is None]
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

    def linears(self, index: int) -> dict[str, nn.Module]:
        """{name inside the layer: linear} of a decoder layer."""
        return {n: m for n, m in self.layers[index].named_modules() if is_linear(m)}

    @torch.no_grad()
    def enter(self, batches: Iterator[torch.Tensor], width: int) -> tuple[list[LayerArguments], Iterator[torch.Tensor]]:
        """Run the part of the model before its first layer. width: number of tokens in a sequence.

        Returns (the keyword arguments that the model passes to each decoder layer, the input states of layer 0, float32
        [n, width, hidden], batch by batch). The embedding is freed after the last batch. UserError if the arguments depend on
        the text.
        """
        arguments: list[dict[str, Any]] = []
        entering: list[torch.Tensor] = []
        forwards = [layer.forward for layer in self.layers]

        # positional arguments are stored by name, so that a layer can be called with keyword arguments alone
        names = list(inspect.signature(type(self.layers[0]).forward).parameters)[1:]

        def record(*args: Any, **kwargs: Any) -> torch.Tensor:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            hidden: torch.Tensor = given.pop(names[0])
            if not arguments:
                entering.append(hidden)
            arguments.append({k: _to(v, self.device) for k, v in given.items()})
            if len(arguments) == len(forwards):
                raise StopForward
            return hidden

        def take(*args: Any, **kwargs: Any) -> torch.Tensor:
            entering.append(args[0] if args else kwargs[names[0]])
            raise StopForward

        for part, prefix in self.outside():
            self.load(part, prefix)

        def run(ids: torch.Tensor) -> torch.Tensor:
            try:
                self.model(input_ids=ids.to(self.device), use_cache=False)
            except StopForward:
                return entering.pop()
            raise UserError("the model did not run its decoder layers", "please report the model_type of its config.json")

        try:
            for layer in self.layers:
                layer.forward = record  # type: ignore[method-assign]
            runs = []
            for ids in (torch.zeros(1, width, dtype=torch.int64), self._two_texts(width)):
                arguments.clear()
                try:
                    run(ids)
                except (TypeError, ValueError, IndexError, AttributeError) as e:  # of the model's own code
                    raise self._uncalibrated(f"its model code needs more of a layer than hidden states ({e})") from e
                runs.append(list(arguments))
            found = [LayerArguments.of_two_runs(one, two) for one, two in zip(*runs, strict=True)]
        except TextDependent as e:
            raise self._uncalibrated(f"its layers are given {e}, which depends on the text or on other layers") from e
        finally:
            for layer, forward in zip(self.layers, forwards, strict=True):
                layer.forward = forward  # type: ignore[method-assign]

        def states() -> Iterator[torch.Tensor]:
            self.layers[0].forward = take  # type: ignore[method-assign]
            try:
                for ids in batches:
                    yield run(ids).float()
            finally:
                self.layers[0].forward = forwards[0]  # type: ignore[method-assign]
                self.leave()

        return found, states()

    def _two_texts(self, width: int) -> torch.Tensor:
        """Token ids [2, width] of two texts that differ from each other and from zeros."""
        ids = torch.arange(2 * width, dtype=torch.int64) % (self.model.get_input_embeddings().weight.shape[0] - 1) + 1
        return ids.view(2, width)

    def _uncalibrated(self, why: str) -> UserError:
        self.leave()
        return UserError(f"llmc cannot run the architecture {self.config.model_type!r} of {self.checkpoint.folder} layer by "
                         f"layer: {why}", "`llmc quantize --method rtn` runs no text")

    def leave(self) -> None:
        """Free the modules that `enter` loaded."""
        for part, _ in self.outside():
            self.free(part)

    def outside(self) -> list[tuple[nn.Module, str]]:
        """(module, name) of every module outside the decoder layers and the head that a text uses and that has parameters or
        buffers itself."""
        head = self.model.get_output_embeddings()
        return [(module, name) for name, module in around(self.model, self.layers_name) if module is not head]


def _to(value: Any, device: torch.device) -> Any:
    """Move an argument of a layer (a tensor, or a tuple with tensors) to the device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_to(v, device) for v in value)
    return value


@dataclass(frozen=True)
class Ending:
    """A child module of a layer that ends in a linear and returns only that linear's output.

    linear: its name in the layer.  nones: number of Nones after the output in the returned tuple; None if it is no tuple.
    feeders: children without linears (norms) whose output only this child uses. They need not run if the child is replaced.
    """

    linear: str
    nones: int | None
    feeders: tuple[str, ...] = ()

    def wrap(self, out: torch.Tensor) -> Any:
        """The return value of the child, made from the linear's output."""
        return out if self.nones is None else (out, *[None] * self.nones)


@dataclass(frozen=True)
class LayerTrace:
    """groups: linears by shared input, in the order in which they run.
    writers: linears whose output is the output of a child module of the layer (in a Llama layer o_proj of self_attn and
    down_proj of mlp). It is added to the residual stream.
    endings: {name of the child: its Ending}, for the children that return only their last linear's output.
    mixtures: {name of a module of experts: the number of groups that run before it}. Its linears are in no group."""

    groups: list[LinearGroup]
    writers: set[str]
    endings: dict[str, Ending]
    mixtures: dict[str, int] = field(default_factory=dict)


@torch.no_grad()
def trace_layer(layer: nn.Module, hidden: torch.Tensor, arguments: dict[str, Any]) -> LayerTrace:
    """Run one sequence [1, n, hidden] through a layer, and find the linears that get the same tensor as input."""
    seen: list[tuple[torch.Tensor, list[str]]] = []  # keeps the inputs alive, so that no other tensor gets their address
    made: dict[int, tuple[str, torch.Tensor]] = {}  # outputs by address, kept alive for the same reason
    outputs: dict[str, torch.Tensor] = {}
    writers: set[str] = set()
    endings: dict[str, Ending] = {}
    mixtures: dict[str, int] = {}

    def linear(name: str) -> Any:
        def note(_module: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            made[out.data_ptr()] = (name, out)
            for tensor, names in seen:
                if tensor is args[0]:
                    names.append(name)
                    return
            seen.append((args[0], [name]))
        return note

    def part(name: str) -> Any:
        def note(_module: nn.Module, _args: tuple[Any, ...], out: Any) -> None:
            first, rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, None)
            outputs[name] = first
            source = made.get(first.data_ptr(), ("", None))[0]
            if source.startswith(name + "."):
                writers.add(source)
                if rest is None or all(x is None for x in rest):
                    endings[name] = Ending(source, None if rest is None else len(rest))
        return note

    inside = {id(x) for m in layer.modules() if isinstance(m, Experts) for x in m.modules()}
    handles = [m.register_forward_hook(linear(n)) for n, m in layer.named_modules() if is_linear(m) and id(m) not in inside]
    handles += [m.register_forward_pre_hook(lambda _m, _args, n=n: mixtures.update({n: len(seen)}))
                for n, m in layer.named_modules() if isinstance(m, Experts)]
    handles += [m.register_forward_hook(part(n)) for n, m in layer.named_children()]
    try:
        leaving = layer(hidden, **arguments)
    finally:
        for handle in handles:
            handle.remove()

    def idle(child: str, ending: str) -> bool:
        """Whether the layer's output stays the same if `child` returns NaN and `ending` returns its recorded output."""
        given = {child: torch.full_like(outputs[child], torch.nan), ending: endings[ending].wrap(outputs[ending])}
        with replaced(layer, {name: lambda *_a, value=value, **_k: value for name, value in given.items()}):
            return torch.equal(_states(layer(hidden, **arguments)), _states(leaving))

    norms = [n for n, m in layer.named_children() if n in outputs and not any(is_linear(x) for x in m.modules())]
    for name in endings:
        endings[name] = replace(endings[name], feeders=tuple(n for n in norms if idle(n, name)))
    return LayerTrace([LinearGroup(tuple(names), tensor.shape[-1]) for tensor, names in seen], writers, endings, mixtures)


@contextmanager
def replaced(layer: nn.Module, forwards: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """Inside, the submodules of a layer named in `forwards` run these functions instead of their forward."""
    parts = [(layer.get_submodule(name), forward) for name, forward in forwards.items()]
    before = [part.forward for part, _ in parts]
    for part, forward in parts:
        part.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        for (part, _), forward in zip(parts, before, strict=True):
            part.forward = forward  # type: ignore[method-assign]


def _states(out: Any) -> torch.Tensor:
    """The hidden states in the return value of a layer, which may be a tuple."""
    states: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return states


def linears_of(skeleton: Skeleton) -> Iterator[tuple[int, str, torch.nn.Module]]:
    """(layer index, name in the model, module) of every linear in the decoder layers, without those that are kept."""
    for index in range(len(skeleton.layers)):
        for name, module in skeleton.linears(index).items():
            if (full := f"{skeleton.layer_name(index)}.{name}") not in skeleton.kept:
                yield index, full, module


def returning(output: Any) -> Callable[..., Any]:
    """A forward for `replaced` that always returns `output`."""
    return lambda *_args, **_kwargs: output
