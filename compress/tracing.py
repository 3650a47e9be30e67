"""What happens inside a decoder layer when it runs: which linears share an input, and which of them end a child module.

One sequence is run through the layer and its linears are watched. Some model code does not call a linear but multiplies with
its weight (Mamba's dt_proj). `direct_uses` watches such products and calls the linear's hooks, as if it had been called.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from llmc.compress.arguments import Call
from llmc.compress.skeleton import LinearGroup
from llmc.formats.linears import is_linear
from llmc.formats.mixture import Experts


@dataclass(frozen=True)
class Ending:
    """A child module of a layer that ends in a linear and returns only that linear's output.

    linear: its name in the layer.  nones: number of Nones after the output in what it returns; None if it returns the output
    itself.  kind: of what it returns otherwise, tuple or list.
    feeders: children without linears (norms) whose output only this child uses. They need not run if the child is replaced.
    """

    linear: str
    nones: int | None
    kind: type[tuple[Any, ...]] | type[list[Any]] = tuple
    feeders: tuple[str, ...] = ()

    def wrap(self, out: torch.Tensor) -> Any:
        """The return value of the child, made from the linear's output."""
        return out if self.nones is None else self.kind((out, *[None] * self.nones))


@dataclass(frozen=True)
class LayerTrace:
    """groups: linears by shared input, in the order in which they run.
    writers: linears whose output is the output of a child module of the layer (in a Llama layer o_proj of self_attn and
    down_proj of mlp). It is added to the residual stream.
    endings: {name of the child: its Ending}, for the children that return only their last linear's output. A layer that makes
    something for later layers has none: all of it must run.
    direct: linears whose weight is used without a call.
    mixtures: {name of a module of experts: the number of groups that run before it}. Its linears are in no group."""

    groups: list[LinearGroup]
    writers: set[str]
    endings: dict[str, Ending]
    direct: frozenset[str] = frozenset()
    mixtures: dict[str, int] = field(default_factory=dict)


@torch.no_grad()
def trace_layer(layer: nn.Module, hidden: torch.Tensor, call: Callable[[], Call]) -> LayerTrace:
    """Run one sequence through a layer, and find the linears that get the same tensor as input. hidden: its states, as the
    layer takes them.  call: makes the arguments of one run."""
    watch = _Watch(layer, hidden)
    watch.run(call)
    ran = watch.ran()
    if uncalled := frozenset(watch.linears) - ran:
        again = _Watch(layer, hidden)
        again.run(call, uncalled)
        if direct := (again.ran() - ran):
            return again.trace(call, direct)
    return watch.trace(call, frozenset())


class _Watch:
    """One watched run of a layer. seen: the inputs of linears; they are kept alive, so that no other tensor gets their
    address.  made: their outputs by address.  outputs: of the layer's children."""

    def __init__(self, layer: nn.Module, hidden: torch.Tensor) -> None:
        self.layer, self.hidden = layer, hidden
        self.seen: list[tuple[torch.Tensor, list[str]]] = []
        self.made: dict[int, tuple[str, torch.Tensor]] = {}
        self.outputs: dict[str, torch.Tensor] = {}
        self.writers: set[str] = set()
        self.endings: dict[str, Ending] = {}
        self.mixtures: dict[str, int] = {}
        self.experts = {n: m for n, m in layer.named_modules() if isinstance(m, Experts)}
        inside = {id(x) for m in self.experts.values() for x in m.modules()}
        self.linears = {n: m for n, m in layer.named_modules() if is_linear(m) and id(m) not in inside}

    def run(self, call: Callable[[], Call], direct: frozenset[str] = frozenset()) -> None:
        handles = [m.register_forward_hook(self._linear(n)) for n, m in self.linears.items()]
        handles += [m.register_forward_pre_hook(self._mixture(n)) for n, m in self.experts.items()]
        handles += [m.register_forward_hook(self._child(n)) for n, m in self.layer.named_children()]
        given = call()
        try:
            with direct_uses(self.layer, direct):
                self.leaving = states_of(self.layer(self.hidden, **given.kwargs))
        finally:
            for handle in handles:
                handle.remove()
        if given.keeps or given.changed():
            self.endings = {}

    def ran(self) -> frozenset[str]:
        return frozenset(n for _, names in self.seen for n in names)

    def trace(self, call: Callable[[], Call], direct: frozenset[str]) -> LayerTrace:
        norms = [n for n, m in self.layer.named_children()
                 if n in self.outputs and not any(is_linear(x) for x in m.modules())]
        endings = {name: replace(ending, feeders=tuple(n for n in norms if self._idle(call, n, name, direct)))
                   for name, ending in self.endings.items()}
        groups = [LinearGroup(tuple(names), tensor.shape[-1]) for tensor, names in self.seen]
        return LayerTrace(groups, self.writers, endings, direct, self.mixtures)

    def _mixture(self, name: str) -> Callable[..., None]:
        def note(_module: nn.Module, _args: Any) -> None:
            self.mixtures.setdefault(name, len(self.seen))
        return note

    def _linear(self, name: str) -> Callable[..., None]:
        def note(_module: nn.Module, args: tuple[torch.Tensor, ...], out: Any) -> None:
            if isinstance(out, torch.Tensor):  # Llama 4's router is a linear that returns a tuple
                self.made[out.data_ptr()] = (name, out)
            if name in self.ran():  # again, with another input
                return
            for tensor, names in self.seen:
                if tensor is args[0]:
                    names.append(name)
                    return
            self.seen.append((args[0], [name]))
        return note

    def _child(self, name: str) -> Callable[..., None]:
        def note(_module: nn.Module, _args: tuple[Any, ...], out: Any) -> None:
            first, rest = (out[0], out[1:]) if isinstance(out, tuple | list) and out else (out, None)
            if not isinstance(first, torch.Tensor):
                return
            self.outputs[name] = first
            source = self.made.get(first.data_ptr(), ("", None))[0]
            if not source.startswith(name + ".") or first.shape[-1] != self.hidden.shape[-1]:
                return
            self.writers.add(source)
            if rest is None or all(x is None for x in rest):
                nones = None if rest is None else len(rest)
                self.endings[name] = Ending(source, nones, list if isinstance(out, list) else tuple)
        return note

    def _idle(self, call: Callable[[], Call], child: str, ending: str, direct: frozenset[str]) -> bool:
        """Whether the layer's output stays the same if `child` returns NaN and `ending` returns its recorded output."""
        given = {child: torch.full_like(self.outputs[child], torch.nan),
                 ending: self.endings[ending].wrap(self.outputs[ending])}
        with replaced(self.layer, {name: returning(value) for name, value in given.items()}):
            return torch.equal(states_of(self.layer(self.hidden, **call().kwargs)), self.leaving)


def direct_uses(layer: nn.Module, names: frozenset[str]) -> Any:
    """A context in which these linears' hooks are called when a product uses their weight. It holds for one thread."""
    return _DirectUses([layer.get_submodule(name) for name in sorted(names)]) if names else nullcontext()


SAME = (torch.Tensor.to, torch.Tensor.float, torch.Tensor.contiguous, torch.Tensor.type_as, torch.Tensor.detach)
TURNED = (torch.t, torch.Tensor.t, torch.transpose, torch.Tensor.transpose,
          torch.Tensor.T.__get__, torch.Tensor.mT.__get__)  # type: ignore[attr-defined]
PRODUCTS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm)


class _DirectUses(TorchFunctionMode):
    """Watches the products of some linears' weights W [out, in]: linear(x, W), x @ W^T, and W @ x^T. (transformers' Conv1D
    stores W^T.) Other uses are not found."""

    def __init__(self, linears: list[nn.Module]) -> None:
        super().__init__()
        # by the id of a weight or a view of it: (linear, whether the tensor is [in, out], the tensor, kept alive)
        self.weights = {id(m.weight): (m, not isinstance(m, nn.Linear), m.weight) for m in linears}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = [self.weights.get(id(a)) for a in args[:2]]
        if known[:1] != [None] and known and func in (*SAME, *TURNED) and isinstance(out, torch.Tensor):
            linear, turned, _ = known[0]  # type: ignore[misc]
            self.weights[id(out)] = linear, turned != (func in TURNED), out
        elif len(known) == 2 and known != [None, None]:
            self._product(func, args, known, out)
        return out

    def _product(self, func: Any, args: Any, known: list[Any], out: Any) -> None:
        if (func is nn.functional.linear and known[1] and not known[1][1]) or (func in PRODUCTS and known[1] and known[1][1]):
            _called(known[1][0], args[0], out)
        elif func in PRODUCTS and known[0] and not known[0][1] and args[1].ndim > 1:
            _called(known[0][0], args[1].transpose(-1, -2), out.transpose(-1, -2))


def _called(linear: Any, x: torch.Tensor, out: torch.Tensor) -> None:
    """Call the hooks of a linear."""
    for hook in list(linear._forward_pre_hooks.values()):
        hook(linear, (x,))
    for hook in list(linear._forward_hooks.values()):
        hook(linear, (x,), out)


@contextmanager
def replaced(layer: nn.Module, forwards: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
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


def states_of(out: Any) -> torch.Tensor:
    """The hidden states in the return value of a layer, which may be a tuple."""
    states: torch.Tensor = out[0] if isinstance(out, tuple | list) else out
    return states


def returning(output: Any) -> Callable[..., Any]:
    """A forward for `replaced` that always returns `output`."""
    return lambda *_args, **_kwargs: output


@dataclass(frozen=True)
class Replay:
    """A run of a layer, as a forward for `replaced` that does the same without computing. out: what it returned.
    contents: of the dicts and lists among its arguments after it ran, by their place."""

    out: Any
    contents: dict[Any, Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for place, container in _containers(args, kwargs):
            content = self.contents[place]
            if hasattr(container, "keys"):
                container.update(content)
            else:
                container[:] = content
        return self.out


@contextmanager
def recorded(layers: nn.Module) -> Iterator[list[Replay]]:
    """Inside, every run of a layer in the list `layers` is added to the list that is yielded."""
    found: list[Replay] = []

    def note(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        found.append(Replay(out, {place: copy.copy(container) for place, container in _containers(args, kwargs)}))

    handles = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers.children()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _containers(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """(place, container) of the dicts and lists among the arguments of a layer."""
    for place, value in [*enumerate(args), *kwargs.items()]:
        if isinstance(value, list) or hasattr(value, "keys"):
            yield place, value
