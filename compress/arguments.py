"""What a model hands to its decoder layers beside the hidden states: masks, positions, rotary tables, embeddings of the
tokens, and what earlier layers made.

The arguments are recorded in runs of the model with other texts and other numbers of sequences, with layers that do nothing
(entering.py). Comparing the runs tells what each tensor is:

    the same in every run                            kept once, as it is
    repeated for each sequence (`Repeated`)          kept once for one sequence
    of the text (`Recorded`)                         kept in a file for all sequences
    a member of what an earlier layer returned (`Returned`), the content of a container that several layers are given
    (`Shared`)                                       kept in a file when the earlier, changed layer has run
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch

from llmc.compress.rows import Carried, Rows

# The content of a container in JSON: None, {"row": key of a tensor}, {"tuple": [tree, …]} or {"list": [tree, …]}
Tree = Any
CPU = torch.device("cpu")


class Unfit(Exception):  # noqa: N818 - its message says what of the model does not fit
    """Layers cannot run one by one, or what they are given is of no kind above."""


@dataclass(frozen=True)
class Repeated:
    """A tensor whose first axis grows with the batch: it holds `once` for each sequence."""

    once: torch.Tensor

    def of(self, n: int) -> torch.Tensor:
        rest = self.once.shape[1:]
        return self.once.expand(n, *rest) if len(self.once) == 1 else self.once.repeat(n, *[1] * len(rest))


@dataclass(frozen=True)
class Recorded:
    """A tensor [n, ...] that depends on the text. key: in the rows of `given`."""

    key: str


@dataclass(frozen=True)
class Returned:
    """A tensor [n, ...] that an earlier layer returned. key: in the rows of the stream."""

    key: str


@dataclass(frozen=True)
class Items:
    """A tuple, list or dict of arguments. empty: a container of its kind.  keys: None for tuples and lists."""

    empty: Any
    keys: tuple[Any, ...] | None
    values: tuple[Any, ...]

    def filled(self, values: list[Any]) -> Any:
        if self.keys is None:
            return tuple(values) if isinstance(self.empty, tuple) else values
        made = copy.copy(self.empty)
        made.update(zip(self.keys, values, strict=True))
        return made


@dataclass(frozen=True)
class Shared:
    """A list or dict that several layers are given, and that a layer may change. number: of the container.  items: its
    content before the first layer.  until: the last layer that is given it."""

    number: int
    items: Items
    until: int


@dataclass(frozen=True)
class Kept:
    """A member of what a layer returns that a later layer is given. path: in the returned value."""

    path: tuple[Any, ...]
    key: str
    until: int


@dataclass
class Call:
    """The arguments of one run of a layer, over the sequences from `first` on. layer: its number.  containers: those in
    `kwargs` that the layer may change, by number.  rows: the tensors in them that earlier layers made: {id: (tensor, key)}.
    before: the leaves of each container before the layer runs."""

    kwargs: dict[str, Any]
    first: int
    layer: int
    carried: Carried | None
    keeps: tuple[Kept, ...]
    containers: dict[int, tuple[Shared, Any]] = field(default_factory=dict)
    rows: dict[int, tuple[torch.Tensor, str]] = field(default_factory=dict)
    before: dict[int, list[tuple[Any, Any]]] = field(default_factory=dict)

    def changed(self) -> list[int]:
        """The numbers of the containers that the layer has changed."""
        return [n for n, (_, container) in self.containers.items() if not _same(self.before[n], list(leaves(container)))]

    def carry(self, out: Any) -> None:
        """Store what the layer made for later layers. out: what it returned."""
        for kept in self.keeps:
            self._write(kept.key, at(out, kept.path), kept.until)
        for number in self.changed():
            shared, container = self.containers[number]
            items = container.items() if isinstance(container, Mapping) else enumerate(container)
            content = [[_key(key), self._tree(value, shared, f"{number}-{i}")] for i, (key, value) in enumerate(items)]
            if self.carried is not None:
                self.carried.note(number, self.layer, content)

    def _tree(self, value: Any, shared: Shared, name: str) -> Tree:
        if value is None:
            return None
        if isinstance(value, tuple | list):
            trees = [self._tree(v, shared, f"{name}-{i}") for i, v in enumerate(value)]
            return {"tuple" if isinstance(value, tuple) else "list": trees}
        if not isinstance(value, torch.Tensor):
            raise RuntimeError(f"layer {self.layer} hands a {type(value).__name__} on to later layers")
        if id(value) in self.rows:
            return {"row": self.rows[id(value)][1]}
        key = f"shared-{name}-of-{self.layer}"
        self._write(key, value, shared.until)
        return {"row": key}

    def _write(self, key: str, value: Any, until: int) -> None:
        if self.carried is not None:
            self.carried.write(key, self.first, value, self.layer, until)


@dataclass(frozen=True)
class LayerArguments:
    """The keyword arguments of a layer. values: they, as the kinds above; what is of no kind is passed as it is.
    given: the rows of `Recorded` tensors.  keeps: what of its output later layers are given."""

    layer: int
    values: dict[str, Any]
    given: Rows | None = None
    keeps: tuple[Kept, ...] = ()
    device: torch.device = CPU

    def call(self, first: int, last: int, carried: Carried | None = None) -> Call:
        """The arguments for the sequences `first` … `last - 1` of a stream. carried: what earlier layers made in it."""
        made = Call({}, first, self.layer, carried, self.keeps)
        for name, value in self.values.items():
            made.kwargs[name] = self._value(value, first, last, made)
        made.before = {n: list(leaves(container)) for n, (_, container) in made.containers.items()}
        return made

    def of(self, first: int, last: int, carried: Carried | None = None) -> dict[str, Any]:
        """The keyword arguments alone."""
        return self.call(first, last, carried).kwargs

    def own(self, layers: list[LayerArguments]) -> list[str]:
        """The names of the arguments that other layers make or that are made for this layer alone. layers: all layers'."""
        others = {x.key for layer in layers if layer is not self for _, x in layer._found() if isinstance(x, Recorded)}
        return sorted({name for name, x in self._found() if isinstance(x, Returned)
                       or (isinstance(x, Shared) and not x.items.values)
                       or (isinstance(x, Recorded) and x.key not in others)})

    def _found(self) -> Iterator[tuple[str, Any]]:
        return ((name, x) for name, value in self.values.items() for x in _nodes(value))

    @property
    def alone(self) -> bool:
        """Whether the layer takes nothing from the text or from other layers but hidden states."""
        return not self.keeps and not any(isinstance(x, Recorded | Returned | Shared) for _, x in self._found())

    def _value(self, node: Any, first: int, last: int, call: Call) -> Any:
        if isinstance(node, Repeated):
            return node.of(last - first)
        if isinstance(node, Recorded):
            assert self.given is not None
            return self._seen(self.given.read(node.key, first, last))
        if isinstance(node, Returned):
            assert call.carried is not None
            return self._seen(call.carried.read(node.key, first, last))
        if isinstance(node, Items):
            return node.filled([self._value(v, first, last, call) for v in node.values])
        if isinstance(node, Shared):
            if node.number not in call.containers:
                call.containers[node.number] = node, self._container(node, first, last, call)
            return call.containers[node.number][1]
        return node

    def _container(self, node: Shared, first: int, last: int, call: Call) -> Any:
        content = call.carried.content(node.number, self.layer) if call.carried else None
        if content is None:
            return self._value(node.items, first, last, call)
        keys, trees = zip(*content, strict=True) if content else ((), ())
        values = tuple(self._tree(tree, first, last, call) for tree in trees)
        return Items(node.items.empty, None if isinstance(node.items.empty, list) else keys, values).filled(list(values))

    def _tree(self, tree: Tree, first: int, last: int, call: Call) -> Any:
        if tree is None:
            return None
        kind, value = next(iter(tree.items()))
        if kind == "row":
            assert call.carried is not None
            tensor = self._seen(call.carried.read(value, first, last))
            call.rows[id(tensor)] = tensor, value
            return tensor
        trees = [self._tree(v, first, last, call) for v in value]
        return tuple(trees) if kind == "tuple" else trees

    def _seen(self, tensor: torch.Tensor) -> torch.Tensor:
        """A stored tensor as the layer sees it in the whole model: in float32, and under autocast as it was made there."""
        if tensor.is_floating_point() and not torch.is_autocast_enabled(self.device.type):
            tensor = tensor.float()
        return tensor.to(self.device)


def at(value: Any, path: tuple[Any, ...]) -> Any:
    """The member of nested tuples, lists and dicts at this path."""
    for step in path:
        value = value[step]
    return value


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(path, member) of everything in nested tuples, lists and dicts that is none of these."""
    if isinstance(value, Mapping):
        for key, v in value.items():
            yield from leaves(v, (*path, key))
    elif isinstance(value, tuple | list):
        for i, v in enumerate(value):
            yield from leaves(v, (*path, i))
    else:
        yield path, value


def mapped(value: Any, change: Any, path: tuple[Any, ...] = ()) -> Any:
    """A copy of nested tuples, lists and dicts in which `change(path, member)` takes the place of every other member."""
    if isinstance(value, MutableMapping):
        made = emptied(value)
        made.update({k: mapped(v, change, (*path, k)) for k, v in value.items()})
        return made
    if isinstance(value, tuple | list):
        members = [mapped(v, change, (*path, i)) for i, v in enumerate(value)]
        return tuple(members) if isinstance(value, tuple) else members
    return change(path, value)


def emptied(container: Any) -> Any:
    """An empty container of the same kind."""
    if isinstance(container, tuple):
        return ()
    made = copy.copy(container)
    made.clear()
    return made


def _key(key: Any) -> str | int:
    if not isinstance(key, str | int):
        raise RuntimeError(f"a layer hands values on under a key of type {type(key).__name__}")
    return key


def _same(one: list[tuple[Any, Any]], two: list[tuple[Any, Any]]) -> bool:
    """Whether two lists of `leaves` have the same objects at the same paths."""
    return len(one) == len(two) and all(p == q and a is b for (p, a), (q, b) in zip(one, two, strict=True))


def _nodes(node: Any) -> Iterator[Any]:
    yield node
    if isinstance(node, Items):
        for value in node.values:
            yield from _nodes(value)
