"""The model before its first layer: the hidden states that enter it, and the arguments of every layer.

The model's own code runs, with layers that return their input. What it hands to each layer is recorded in four runs and
compared (arguments.py): one sequence, two other ones, the second of these alone, and both again with layers that return
something else. An argument that differs in the last run is made from what layers return. Such a model can run layer by layer
only if it hands this on unchanged.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from llmc.compress.arguments import (
    Items,
    Kept,
    LayerArguments,
    Recorded,
    Repeated,
    Returned,
    Shared,
    Unfit,
    emptied,
    leaves,
    mapped,
)
from llmc.compress.rows import Rows
from llmc.compress.skeleton import Skeleton, StopForward
from llmc.errors import UserError
from llmc.files import check_disk
from llmc.formats.linears import drop_parts

PLAIN = (bool, int, float, str, torch.dtype, torch.device)  # what may be passed on as it is, besides tensors and None


@dataclass
class Entered:
    """layers: the arguments of each.  shape: of one sequence's hidden states, [tokens, hidden]; in Gemma 3n [streams, tokens,
    hidden].  axis: of the sequences in the states that a layer takes.  outputs: what layers return.
    states: those that enter layer 0, float32, batch by batch. The arguments that depend on the text are stored on the way,
    and the model's embedding is freed after the last batch."""

    layers: list[LayerArguments]
    shape: tuple[int, ...]
    axis: int
    outputs: Outputs
    states: Iterator[torch.Tensor]


@dataclass(frozen=True)
class Outputs:
    """The kind of value that the layers of a model return. example: what layer 0 returned; None for the hidden states."""

    example: Any

    @classmethod
    def like(cls, out: Any) -> Outputs:
        """out: what a layer returned. Raises Unfit if no hidden states are in it."""
        if isinstance(out, torch.Tensor):
            return cls(None)
        if isinstance(out, tuple | list) and out and isinstance(out[0], torch.Tensor):
            return cls(out)
        raise Unfit(f"its layers return a {type(out).__name__}")

    def of(self, states: torch.Tensor, other: Callable[[torch.Tensor], Any] | None = None) -> Any:
        """A returned value with these hidden states. other: from a tensor of the example to the one in its place; without it
        there is None."""
        if self.example is None:
            return states

        def member(path: tuple[Any, ...], value: Any) -> Any:
            if path == (0,):
                return states
            return None if other is None or not isinstance(value, torch.Tensor) else other(value)

        return mapped(self.example, member)


@dataclass
class Recording:
    """A run of the model. given: the arguments of each layer.  states: those that enter each layer.  returned: by each."""

    given: list[dict[str, Any]] = field(default_factory=list)
    states: list[torch.Tensor] = field(default_factory=list)
    returned: list[Any] = field(default_factory=list)


class Recorder:
    """Runs a model with layers that return their input."""

    def __init__(self, skeleton: Skeleton) -> None:
        self.skeleton = skeleton
        self.forwards = [layer.forward for layer in skeleton.layers]
        # positional arguments are stored by name, so that a layer can be called with keyword arguments alone
        self.names = [list(inspect.signature(type(layer).forward).parameters)[1:] for layer in skeleton.layers]
        self.outputs: Outputs | None = None

    def run(self, ids: torch.Tensor, disturbed: bool = False, only_first: bool = False) -> Recording:
        """Run token ids [n, tokens] through the model. disturbed: the layers return other values.  only_first: end at the
        first layer. Raises Unfit if the model does not run its layers one after another."""
        found = Recording()

        def stand_in(index: int) -> Callable[..., Any]:
            return lambda *args, **kwargs: self._layer(found, index, args, kwargs, disturbed, only_first)

        def stop(*_args: Any) -> None:
            raise StopForward

        model, layers = self.skeleton.model, self.skeleton.layers
        handle = model.get_output_embeddings().register_forward_pre_hook(stop)  # the head has no weights yet
        try:
            for i, layer in enumerate(layers):
                layer.forward = stand_in(i)  # type: ignore[method-assign]
            model(input_ids=ids.to(self.skeleton.device), use_cache=False)
        except StopForward:
            pass
        except (TypeError, ValueError, IndexError, AttributeError) as e:  # of the model's own code
            raise Unfit(f"its model code needs more of a layer than llmc sees ({e})") from e
        finally:
            handle.remove()
            for layer, forward in zip(layers, self.forwards, strict=True):
                layer.forward = forward  # type: ignore[method-assign]
        if not only_first and len(found.given) != len(layers):
            raise Unfit(f"it runs {len(found.given)} of its {len(layers)} layers")
        return found

    def _layer(self, found: Recording, index: int, args: tuple[Any, ...], kwargs: dict[str, Any], disturbed: bool,
               only_first: bool) -> Any:
        names = self.names[index]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        hidden: torch.Tensor = given.pop(names[0])
        if index != len(found.given):
            raise Unfit(f"it runs layer {index} after {len(found.given)} others")
        if found.states and hidden is not found.states[-1] and not torch.equal(found.states[-1], hidden):
            raise Unfit(f"it changes the hidden states between layers {index - 1} and {index}")
        found.given.append(given)
        found.states.append(hidden)
        if only_first:
            raise StopForward
        if self.outputs is None:
            self.outputs = self._outputs(hidden, given)
        if disturbed:
            found.states[-1] = hidden + 1
        out = self.outputs.of(found.states[-1], lambda t: torch.full_like(t, 1.0 + disturbed))
        found.returned.append(out)
        return out

    def _outputs(self, hidden: torch.Tensor, given: dict[str, Any]) -> Outputs:
        """Run layer 0 with its weights. What it returns tells what every layer returns."""
        with self.skeleton.layer(0):
            return Outputs.like(self.forwards[0](hidden, **mapped(given, lambda _path, value: value)))


@torch.no_grad()
def enter(skeleton: Skeleton, batches: Iterator[torch.Tensor], width: int, given: Rows | None = None) -> Entered:
    """Run the part of the model before its first layer.

    batches: token ids [n, width] of all sequences in their order.  given: takes what layers are given of the text. Without it
    a layer may depend on nothing but hidden states. UserError if the model cannot be run layer by layer.
    """
    for part, prefix in skeleton.outside():
        skeleton.load(part, prefix)
    drop_parts(skeleton.model, skeleton.layers_name)
    recorder = Recorder(skeleton)
    try:
        zeros, texts = torch.zeros(1, width, dtype=torch.int64), _two_texts(skeleton, width)
        runs = [recorder.run(zeros), recorder.run(texts), recorder.run(texts[1:]), recorder.run(texts, disturbed=True)]
        compared = _Comparison(skeleton, given, *runs)
        layers, places = compared.layers(), compared.places
        if given is None and not all(layer.alone for layer in layers):
            raise Unfit("its layers are given values that depend on the text or on other layers")
        axis = compared.axis()
        if given is not None and places:
            needed = given.count * sum(place.of(runs[0]).nbytes for place in places.values())
            check_disk(given.folder, needed, "keeping what the layers are given of the text")
    except Unfit as e:
        skeleton.leave()
        raise UserError(f"llmc cannot run the architecture {skeleton.config.model_type!r} of {skeleton.checkpoint.folder} "
                        f"layer by layer: {e}", "`llmc quantize --method rtn` runs no text") from e
    shape = tuple(runs[0].states[0].movedim(axis, 0).shape[1:])
    assert recorder.outputs is not None
    del runs, compared  # large

    def states() -> Iterator[torch.Tensor]:
        first = 0
        try:
            for ids in batches:
                run = recorder.run(ids, only_first=not places)
                for key, place in places.items():
                    assert given is not None
                    given.write(key, first, place.of(run), -1, place.until)
                first += len(ids)
                yield run.states[0].float()
        finally:
            skeleton.leave()

    return Entered(layers, shape, axis, recorder.outputs, states())


def _two_texts(skeleton: Skeleton, width: int) -> torch.Tensor:
    """Token ids [2, width] of two texts that differ from each other and from zeros."""
    ids = torch.arange(2 * width, dtype=torch.int64) % (skeleton.model.get_input_embeddings().weight.shape[0] - 1) + 1
    return ids.view(2, width)


@dataclass
class Place:
    """Where a tensor of the text is found in a recording: the first layer that is given it. until: the last one."""

    layer: int
    path: tuple[Any, ...]
    until: int

    def of(self, run: Recording) -> torch.Tensor:
        value: Any = run.given[self.layer]
        for step in self.path:
            value = value[step]
        found: torch.Tensor = value
        return found


class _Comparison:
    """Four recordings (see above) side by side. places: of the tensors that depend on the text, by key."""

    def __init__(self, skeleton: Skeleton, given: Rows | None, one: Recording, both: Recording, second: Recording,
                 disturbed: Recording) -> None:
        self.skeleton, self.given, self.runs = skeleton, given, (one, both, second, disturbed)
        self.places: dict[str, Place] = {}
        self.keys: dict[int, str] = {}  # of tensors of the text, by id in the first recording
        self.kept: dict[int, dict[tuple[Any, ...], Kept]] = {}  # by the layer that returns it
        # every tensor that a layer returned, by id: (layer, path)
        self.returned = [{id(leaf): (i, path) for i, out in enumerate(run.returned) for path, leaf in leaves(out)
                          if isinstance(leaf, torch.Tensor) and path not in ((), (0,))} for run in self.runs]
        self.containers = self._containers(one)

    @staticmethod
    def _containers(run: Recording) -> dict[int, list[int]]:
        """{id of a list or dict: the layers that are given it}, for those that several layers are given."""
        found: dict[int, list[int]] = {}
        for index, given in enumerate(run.given):
            for container in {id(c): c for c in _mutable(list(given.values()))}:
                found.setdefault(container, []).append(index)
        return {c: layers for c, layers in found.items() if len(layers) > 1}

    def layers(self) -> list[LayerArguments]:
        """The arguments of every layer. Raises Unfit."""
        values = []
        for index, parts in enumerate(zip(*(run.given for run in self.runs), strict=True)):
            if any(set(part) != set(parts[0]) for part in parts):
                raise Unfit(f"its layers are given {', '.join(parts[0])} for one text and other arguments for another one")
            values.append({name: self._node(index, (name,), tuple(part[name] for part in parts)) for name in parts[0]})
        return [LayerArguments(i, v, self.given, tuple(self.kept.get(i, {}).values()), self.skeleton.device)
                for i, v in enumerate(values)]

    def axis(self) -> int:
        """The axis of the sequences in the hidden states."""
        one, two = (run.states[0].shape for run in self.runs[:2])
        differ = [i for i, (a, b) in enumerate(zip(one, two, strict=True)) if a != b]
        if len(differ) != 1 or one[differ[0]] != 1 or two[differ[0]] != 2:
            raise Unfit(f"its layers take states {list(one)} for one sequence and {list(two)} for two")
        return differ[0]

    def _node(self, layer: int, path: tuple[Any, ...], values: tuple[Any, ...]) -> Any:
        """The kind of an argument. values: its value in each recording."""
        one, name = values[0], ".".join(map(str, path))
        if len({type(v) for v in values}) != 1:
            raise Unfit(f"its layers are given {name}, which is a {_kinds(values)}")
        if isinstance(one, torch.Tensor):
            return self._tensor(layer, path, name, values)
        if hasattr(one, "keys"):
            keys = tuple(one.keys())
            if any(tuple(v.keys()) != keys for v in values):
                raise Unfit(f"its layers are given {name}, whose keys depend on the text or on other layers")
            return self._container(one, Items(emptied(one), keys, tuple(
                self._node(layer, (*path, k), tuple(v[k] for v in values)) for k in keys)))
        if isinstance(one, tuple | list):
            if any(len(v) != len(one) for v in values):
                raise Unfit(f"its layers are given {name}, whose length depends on the text or on other layers")
            return self._container(one, Items(emptied(one), None, tuple(
                self._node(layer, (*path, i), tuple(v[i] for v in values)) for i in range(len(one)))))
        if one is not None and not isinstance(one, PLAIN):
            raise Unfit(f"its layers are given {name}, a {type(one).__name__}")
        if any(v != one for v in values):
            raise Unfit(f"its layers are given {name}, which is {one} for one text and {values[1]} for two")
        return one

    def _container(self, one: Any, items: Items) -> Any:
        layers = self.containers.get(id(one))
        if layers is None or isinstance(one, tuple):
            return items
        return Shared(list(self.containers).index(id(one)), items, layers[-1])

    def _tensor(self, layer: int, path: tuple[Any, ...], name: str, values: tuple[torch.Tensor, ...]) -> Any:
        one, both, second, disturbed = values
        made = {returned.get(id(v)) for returned, v in zip(self.returned, values, strict=True)}
        if made != {None}:
            return self._of_layer(layer, name, made)
        if not _equal(both, disturbed):
            raise Unfit(f"its layers are given {name}, which is made from what other layers return")
        if _equal(one, both) and _equal(one, second):
            return one.to(self.skeleton.device)
        if one.ndim and _equal(one, second) and _equal(torch.cat([one, one]), both):
            return Repeated(one.to(self.skeleton.device))
        if not one.ndim or (len(one), len(both)) != (1, 2) or not torch.allclose(both[1:].float(), second.float(), atol=1e-4):
            raise Unfit(f"its layers are given {name}, which depends on the text and does not belong to one sequence each")
        key = self.keys.setdefault(id(one), f"{layer}-{len(self.keys)}")
        self.places.setdefault(key, Place(layer, path, layer)).until = layer
        return Recorded(key)

    def _of_layer(self, layer: int, name: str, made: set[tuple[int, tuple[Any, ...]] | None]) -> Any:
        """The kind of an argument that is returned by a layer. made: (that layer, path), of each recording."""
        source = made.pop()
        if made or source is None:
            raise Unfit(f"its layers are given {name}, which another layer returns for some texts only")
        index, path = source
        key = f"of-{index}-{'-'.join(map(str, path))}"
        self.kept.setdefault(index, {})[path] = Kept(path, key, layer)
        return Returned(key)


def _mutable(value: Any) -> Iterator[Any]:
    """The lists and dicts in nested arguments."""
    if hasattr(value, "keys"):
        yield value
        for v in value.values():
            yield from _mutable(v)
    elif isinstance(value, tuple | list):
        for v in value:
            if isinstance(v, list):
                yield v
            yield from _mutable(v)


def _equal(one: torch.Tensor, two: torch.Tensor) -> bool:
    return one.shape == two.shape and one.dtype == two.dtype and torch.equal(one, two)


def _kinds(values: tuple[Any, ...]) -> str:
    return " or a ".join(sorted({type(v).__name__ for v in values}))
