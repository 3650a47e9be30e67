"""A model without weights in memory: built on the meta device, and filled one decoder layer at a time.

This module does not depend on the architecture. The decoder layers are the module list that is as long as the text config
says. To find the linears of a layer that share an input, one sequence is run through it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator
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
from llmc.formats.mixture import Experts, unfuse
from llmc.formats.names import Names, missing


@dataclass(frozen=True)
class LinearGroup:
    """Linears (names inside the layer) that read the same input of width `in_features`, in the order in which they run."""

    names: tuple[str, ...]
    in_features: int


EXPERTS = re.compile(r"(?:^|[._])(?:experts?|moe)(?:[._]|$)")  # in the names of a mixture of experts


class StopForward(Exception):  # noqa: N818 - not an error
    """Raised by a hook to end a forward pass when the rest is not needed."""


def is_linear(module: nn.Module) -> bool:
    """Whether a module is an nn.Linear, or transformers' Conv1D (GPT-2), which stores its weight transposed."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def get_weight(linear: nn.Module) -> torch.Tensor:
    """The weight as [out, in] (a view)."""
    weight = linear.weight.data
    assert isinstance(weight, torch.Tensor)
    return weight if isinstance(linear, nn.Linear) else weight.t()


def set_weight(linear: nn.Module, weight: torch.Tensor) -> None:
    """Replace the weight by `weight` [out, in]."""
    get_weight(linear).copy_(weight)


class Skeleton:
    """The model of a checkpoint on the meta device. The caller loads and frees its parts."""

    def __init__(self, checkpoint: Checkpoint, device: str) -> None:
        self.checkpoint, self.device = checkpoint, torch.device(device)
        self.config = load_config(checkpoint.folder)
        self.model = empty_model(self.config)
        linears = quantized.linears(checkpoint)
        self.names = Names.of(checkpoint, self.model, linears)
        self._lazy: dict[int, tuple[str, bool]] = {}  # id of an expert's linear -> (its name, whether the files transpose it)
        self.layers_name, self.layers = find_layers(self.model)
        self._unfuse()
        self.kept: frozenset[str] = frozenset()  # linears that no pass changes (coverage.py)
        self._check_layers()
        self.ends: Ends = ends_of(checkpoint, self.model, self.names)[0]
        self._check_unread({part for linear in linears for part in quantized.parts(linear)})

    def _unfuse(self) -> None:
        """Replace stacked experts of the decoder layers by linears, which are filled when their expert runs."""
        for path, experts in unfuse(self.layers, lambda name: self.names.leaves(f"{self.layers_name}.{name}")).items():
            for number in range(experts.count):
                for name, linear in experts.linears(number).items():
                    self._lazy[id(linear)] = f"{self.layers_name}.{path}.{name}", experts.transposed
            experts.fill = self.filled

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

    def load(self, module: nn.Module, prefix: str) -> None:
        """Fill a module's parameters and persistent buffers from the checkpoint, in float32.

        Embeddings keep their stored dtype, because they can be gigabytes; a hook casts their output to float32. UserError if
        a tensor is missing or has another shape than in config.json.
        """
        for path, sub in module.named_modules():
            if id(sub) in self._lazy:  # `filled` reads it
                continue
            here = f"{prefix}.{path}".strip(".")
            embedding = isinstance(sub, nn.Embedding)
            for name, _ in [*sub.named_parameters(recurse=False), *sub.named_buffers(recurse=False)]:
                full = f"{here}.{name}"
                value = self.names.read(full)
                if value is None:
                    if name in sub._buffers:  # computed when the module is built
                        sub._buffers[name] = sub._buffers[name].to(self.device)  # type: ignore[union-attr]
                        continue
                    raise missing(self.checkpoint.folder, full)
                if value.is_floating_point() and not embedding:
                    value = value.to(torch.float32)
                value = value.to(self.device)
                if name in sub._buffers:
                    sub._buffers[name] = value
                    continue
                self._check_shape(full, value, sub._parameters[name])
                sub._parameters[name] = nn.Parameter(value, requires_grad=False)
            if embedding and not sub._forward_hooks:
                sub.register_forward_hook(lambda _m, _args, out: out.float())

    def _check_shape(self, name: str, value: torch.Tensor, expected: torch.Tensor | None) -> None:
        if expected is not None and expected.shape != value.shape:
            place = self.names.locate(name)
            raise UserError(f"{place.name if place else name} has shape {list(value.shape)}, config.json says "
                            f"{list(expected.shape)}", "the checkpoint and its config.json do not belong together")

    @contextmanager
    def filled(self, linears: Iterable[nn.Module]) -> Iterator[None]:
        """Inside, these linears have their weights. Linears of experts are filled here and freed at the end; others have
        theirs as long as their layer is loaded."""
        empty = [m for m in linears if id(m) in self._lazy and m.weight.device.type == "meta"]  # type: ignore[union-attr]
        try:
            for linear in empty:
                name, transposed = self._lazy[id(linear)]
                place, value = self.names.locate(f"{name}.weight"), self.names.read(f"{name}.weight")
                if place is None or value is None:
                    raise missing(self.checkpoint.folder, f"{name}.weight")
                if place.expert is not None and transposed:
                    value = value.t()
                value = value.to(self.device, torch.float32).contiguous()
                self._check_shape(f"{name}.weight", value, linear.weight)  # type: ignore[arg-type]
                linear.weight = nn.Parameter(value, requires_grad=False)
            yield
        finally:
            for linear in empty:
                self.free(linear)

    @staticmethod
    def free(module: nn.Module) -> None:
        """Move a module's parameters back to the meta device."""
        for sub in module.modules():
            for name, p in sub._parameters.items():
                if p is not None and p.device.type != "meta":
                    sub._parameters[name] = nn.Parameter(p.data.to("meta"), requires_grad=False)

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
        """(module, name) of every module outside the decoder layers and the head that has parameters or buffers itself.
        Of a multimodal model only those of the part with the decoder layers: a text uses no others."""
        head = self.model.get_output_embeddings()
        is_text = self.config.get_text_config() is self.config
        part = "" if is_text else self.layers_name.rpartition(".")[0] + "."
        found = []
        for name, module in self.model.named_modules():
            inside = name.startswith(self.layers_name + ".") or module is head
            if not inside and name.startswith(part) and (module._parameters or module._buffers):
                found.append((module, name))
        return found


def _to(value: Any, device: torch.device) -> Any:
    """Move an argument of a layer (a tensor, or a tuple with tensors) to the device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_to(v, device) for v in value)
    return value


def find_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """Returns (name, module list) of the decoder layers: the module list with linears that has as many members as the text
    config says. If several have (vision layers), the one in the module with the text config. UserError if there is none."""
    text = model.config.get_text_config()
    count = getattr(text, "num_hidden_layers", None)
    lists = [(n, m) for n, m in model.named_modules()
             if isinstance(m, nn.ModuleList) and len(m) == count and any(is_linear(x) for x in m[0].modules())]
    if not lists:
        raise UserError(f"{type(model).__name__} has no list of {count} decoder layers", "llmc needs a decoder-only model")

    def of_text(name: str) -> bool:
        """Whether the nearest module above with a config has the text config."""
        above = [model, *(model.get_submodule(name[:i]) for i, c in enumerate(name) if c == ".")]
        config = next(m.config for m in reversed(above) if hasattr(m, "config"))
        return bool(config.get_text_config().model_type == text.model_type)

    return next((pair for pair in lists if of_text(pair[0])), lists[0])


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
