"""One decoder layer of the calibration loop: it runs over all sequences for each group of linears and for its output."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmc.compress.arguments import LayerArguments
from llmc.compress.mixture_run import ENOUGH, STRENGTH, MixtureRun, Sent
from llmc.compress.shrinkage import Variation
from llmc.compress.skeleton import LinearGroup, StopForward
from llmc.compress.states import Scratch, StateStore
from llmc.compress.tracing import Ending, LayerTrace, direct_uses, replaced, states_of
from llmc.compress.workers import share
from llmc.console import warn
from llmc.formats.linears import get_weight
from llmc.precision import fast_forward, fast_matmul, matmul_precision


@dataclass
class InputStatistics:
    """Statistics of the inputs x of a group of linears.

    hessian: float32 [in, in], the sum of x x^T over tokens. It has no factor 2 as in the GPTQ paper, because it cancels.
    tokens: number of inputs x.
    drift, drift_hessian: float32 [in, in], the sums of (x' - x) x^T and of x x^T over the sequences that also ran through the
    unchanged model. x' is the input of the same linear in the unchanged model. None if no sequence ran there. Both sums are
    over the same tokens, because with the Hessian of other tokens the correction is too large or too small where a few tokens
    dominate.
    peak: float32 [in], the largest |x| of each column, before the division below; None if it was not requested.
    variation: how much the sequences' parts of the Hessian differ; None for experts, whose tokens come from all sequences.

    A linear that ends a child module of the layer writes to the residual stream. Its inputs are divided by the root mean
    square of the stream at their token. The next module normalizes the stream, so an error counts relative to it. Without the
    division the few tokens with very large states would dominate the sums. The stream is taken before or after the linear's
    output is added, whichever is larger: in the layer that makes the large states, only the stream after it is large.
    """

    hessian: torch.Tensor
    tokens: int = 0
    drift: torch.Tensor | None = None
    drift_hessian: torch.Tensor | None = None
    peak: torch.Tensor | None = None
    variation: Variation | None = None


class LayerRun:
    """One layer, run over all sequences once for each group and once for its output.

    scratch: a folder for inputs of linears.  workers: number of batches that run in parallel; each worker has its own sums.
    peaks: store each column's largest |x| too.
    sequential: groups are changed one after another. Then no linear runs twice: when the input of the linear that ends a
    child module is known, the module is replaced by that linear on that input (in a Llama layer the attention runs once, not
    four times). This is correct only if everything before the linear is final.
    """

    def __init__(self, layer: nn.Module, arguments: LayerArguments, trace: LayerTrace, store: StateStore, scratch: Path,
                 sequential: bool, workers: int = 1, peaks: bool = False) -> None:
        self.layer, self.arguments, self.store, self.workers, self.peaks = layer, arguments, store, workers, peaks
        self.groups, self.current = trace.groups, Current()
        self.device = next(layer.parameters()).device
        dtype = torch.bfloat16 if matmul_precision() == "bf16" else torch.float32
        self.writers, self.direct = trace.writers, trace.direct
        self.forward = self._precision()
        self.endings = trace.endings if sequential else {}
        self.inputs = {e.linear: Scratch(scratch / f"input-{part}", dtype) for part, e in self.endings.items()}
        self.unchanged = {g.names[0]: Scratch(scratch / f"unchanged-{i}", dtype) for i, g in enumerate(trace.groups)}
        self.mixtures = [MixtureRun(name, layer.get_submodule(name), after, scratch, self.forward)  # type: ignore[arg-type]
                         for name, after in trace.mixtures.items()]

    def _precision(self) -> Callable[[torch.device], AbstractContextManager[None]]:
        """The context in which the layer runs: that of bf16, if its code runs there."""
        if matmul_precision() != "bf16":
            return fast_forward
        hidden = self.store.read(0, 1).to(self.device)
        try:
            with torch.no_grad(), fast_forward(self.device):
                self.layer(hidden, **self.arguments.of(0, 1, self.store.carried))
        except RuntimeError as e:  # some code mixes types in ways that autocast does not know, as index_add_
            _say_slow(type(self.layer).__name__, str(e).splitlines()[0])
            return lambda _device: fast_matmul()
        return fast_forward

    def keep_unchanged_inputs(self, store: StateStore) -> None:
        """Run the unchanged layer over the reference states and store the input of every group."""
        self.run_experts(store)
        self._watched(store, lambda group, x: self.unchanged[group.names[0]].put(self.current.batch, x), self.workers)

    def watch(self, see: Callable[[LinearGroup, torch.Tensor], None]) -> None:
        """Run the unchanged layer and call `see` with the input of every group, in the order of the batches."""
        for mixture in self.mixtures:
            def show(number: int, routed: Sent, mixture: MixtureRun = mixture) -> None:
                for last, group in enumerate(mixture.groups(number)):
                    for rows, _, _ in mixture.inputs(number, routed, bool(last)):
                        see(group, rows[None])
            self.route(mixture, self.store)
            mixture.run(self.store, show)
        self._watched(self.store, see, workers=1)

    def run_experts(self, store: StateStore) -> None:
        """Run the experts as they are over a stream. Later runs of the layer over this stream take their outputs."""
        for mixture in self.mixtures:
            self.route(mixture, store)
            mixture.run(store)

    def route(self, mixture: MixtureRun, store: StateStore) -> None:
        """Run the layer up to a module of experts and keep what the router sends there."""
        self._forward(store, 1, {f"{mixture.name}.routed": mixture.recorder(store, self._position)})

    def change_experts(self, mixture: MixtureRun,
                       change: Callable[[LinearGroup, InputStatistics], None]) -> None:
        """Let a pass change every expert, one after another. Later runs of the layer take the changed experts' outputs."""
        self.route(mixture, self.store)

        def visit(number: int, routed: Sent) -> None:
            for last, group in enumerate(mixture.groups(number)):
                change(group, self._of_expert(mixture, number, routed, bool(last)))

        mixture.run(self.store, visit)

    def _of_expert(self, mixture: MixtureRun, number: int, routed: Sent, last: bool) -> InputStatistics:
        """The statistics of the input of an expert's first linears, or of its last one (see mixture_run.py)."""
        group = mixture.groups(number)[last]
        found = InputStatistics(torch.zeros(group.in_features, group.in_features, device=self.device))
        if self.peaks:
            found.peak = torch.zeros(group.in_features, device=self.device)
        tokens, weights = routed.sent_to(number)
        for x, part, by in mixture.inputs(number, routed, last):
            add_gram(found.hessian, self._weighted(mixture, number, x, part, by, last))
            found.tokens += len(x)
            if found.peak is not None:
                found.peak = torch.maximum(found.peak, x.abs().amax(0).float())
        if len(tokens) < ENOUGH * group.in_features:
            typical = float(weights.square().mean().sqrt()) if len(weights) else float(routed.weights.mean())
            prior, n = torch.zeros_like(found.hessian), 0
            for x, part, by in mixture.inputs(number, routed, last, sample=True):
                add_gram(prior, self._weighted(mixture, number, x, part, by * typical, last))
                n += len(x)
            found.hessian.add_(prior, alpha=STRENGTH * group.in_features / n)
        mirror_upper(found.hessian)
        return found

    def _weighted(self, mixture: MixtureRun, number: int, x: torch.Tensor, tokens: torch.Tensor, by: torch.Tensor,
                  last: bool) -> torch.Tensor:
        """Rows x [n, in] of an expert's linear, times the weight of their tokens in the output of the layer."""
        scale = by.to(self.device)
        if last:
            hidden = self.store.rows(tokens).to(self.device)
            added = mixture.outer(number, x) * scale[:, None]
            norm = torch.maximum(torch.linalg.vector_norm(hidden, dim=-1), torch.linalg.vector_norm(hidden + added, dim=-1))
            scale = scale / norm.mul_(hidden.shape[-1] ** -0.5).clamp_min_(1e-6)
        return x.float() * scale[:, None]

    def _position(self) -> int:
        """The first sequence of this thread's batch."""
        return self.current.batch * self.store.batch

    def write_outputs(self) -> None:
        """Run the changed layer. Its output is written to the store as the next states."""
        self.store.clear()
        self._forward(self.store, self.workers)

    def gather(self, groups: list[LinearGroup]) -> list[InputStatistics]:
        """Run every sequence up to the last of `groups`. Returns the statistics of each group's input."""
        found = [[self._empty(g) for g in groups] for _ in range(self.workers)]

        def hook(position: int) -> Any:
            name = groups[position].names[0]
            kept = self.inputs.get(name)

            def accumulate(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
                with torch.autocast(self.device.type, enabled=False):
                    self._add(found[self.current.worker][position], name, args[0])
                if kept is not None:
                    kept.put(self.current.batch, args[0])
                if position == len(groups) - 1:
                    raise StopForward
            return accumulate

        handles = [self.layer.get_submodule(g.names[0]).register_forward_pre_hook(hook(i)) for i, g in enumerate(groups)]
        try:
            self._forward(self.store, self.workers)
        finally:
            for handle in handles:
                handle.remove()
        return [total(list(parts)) for parts in zip(*found, strict=True)]

    def _watched(self, store: StateStore, see: Callable[[LinearGroup, torch.Tensor], None], workers: int) -> None:
        handles = [self.layer.get_submodule(g.names[0]).register_forward_pre_hook(
            lambda _m, args, group=g: see(group, args[0])) for g in self.groups]
        store.clear()
        try:
            self._forward(store, workers)
        finally:
            for handle in handles:
                handle.remove()

    def _empty(self, group: LinearGroup) -> InputStatistics:
        n = group.in_features
        found = InputStatistics(torch.zeros(n, n, device=self.device), variation=Variation())
        if self.unchanged[group.names[0]].places:
            found.drift = torch.zeros(n, n, device=self.device)
        if self.peaks:
            found.peak = torch.zeros(n, device=self.device)
        return found

    def _add(self, statistics: InputStatistics, name: str, x: torch.Tensor) -> None:
        """Add one input batch x [n, seq_len, in] of linear `name` to the statistics."""
        batch, unchanged = self.current.batch, self.unchanged[name]
        weight = self._relative(name, x) if name in self.writers else None
        rows = relative(x, weight)
        add_gram(statistics.hessian, rows)
        statistics.tokens += rows.shape[0]
        if statistics.variation is not None:
            statistics.variation.add(rows.unflatten(0, (self.current.sequences, -1)))
        if statistics.peak is not None:
            statistics.peak = torch.maximum(statistics.peak, x.reshape(rows.shape).abs().amax(0).float())
        if statistics.drift is not None and batch in unchanged.places:
            difference = relative(unchanged.get(batch).to(self.device) - x, weight)
            with fast_matmul():
                statistics.drift.addmm_(difference.t(), rows)
            # batches with a reference come first, and this is the worker's last one
            if batch + self.workers >= len(unchanged.places):
                statistics.drift_hessian = statistics.hessian.clone()

    def _relative(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """1 / (root mean square of the residual stream) at each token, [tokens, 1] (see InputStatistics)."""
        linear: Any = self.layer.get_submodule(name)
        hidden = self.current.hidden.movedim(self.store.axis, 0)  # [n, seq_len, hidden], or [n, streams, seq_len, hidden]
        with self.forward(self.device):
            added = nn.functional.linear(x, get_weight(linear), linear.bias)
        added = added.reshape(hidden.shape[0], *[1] * (hidden.ndim - 3), *hidden.shape[-2:])
        norm = torch.maximum(torch.linalg.vector_norm(hidden, dim=-1), torch.linalg.vector_norm(hidden + added, dim=-1))
        if norm.ndim > 2:  # over the streams of a model with several
            norm = norm.flatten(1, -2).square().mean(1).sqrt()
        return norm.mul_(hidden.shape[-1] ** -0.5).clamp_min_(1e-6).reciprocal_().view(-1, 1)

    def _forward(self, store: StateStore, workers: int, instead: dict[str, Callable[..., Any]] | None = None) -> None:
        """Run the layer over the states of `store` and write its output there, except for batches that a hook stopped.

        instead: {name of a module: function that runs in its place}."""
        batches = list(enumerate(store.starts()))

        def job(worker: int) -> Iterator[None]:
            for batch, (first, last) in batches[worker::workers]:
                hidden = store.read(first, last).to(self.device)
                self.current.worker, self.current.batch, self.current.hidden = worker, batch, hidden
                self.current.sequences = last - first
                with suppress(StopForward), self.forward(self.device), direct_uses(self.layer, self.direct):
                    call = self.arguments.call(first, last, store.carried)
                    out = self.layer(hidden, **call.kwargs)
                    store.write(first, states_of(out))
                    call.carry(out)
                yield

        with fast_matmul(), replaced(self.layer, self._shortcuts(store) | (instead or {})):
            share(workers, job)

    def _shortcuts(self, store: StateStore) -> dict[str, Callable[..., Any]]:
        """Forward functions for the child modules whose last linear's input is known: they run that linear alone. Experts
        that have run return their outputs."""
        forwards: dict[str, Callable[..., Any]] = {}
        for mixture in self.mixtures:
            if (answer := mixture.answering(store, self._position)) is not None:
                forwards[f"{mixture.name}.routed"] = answer
        for name, ending in self.endings.items():
            if self.inputs[ending.linear].places:
                forwards[name] = self._ending(ending)
                forwards |= dict.fromkeys(ending.feeders, lambda states, *_args, **_kwargs: states)
        return forwards

    def _ending(self, ending: Ending) -> Callable[..., Any]:
        def run(*_args: Any, **_kwargs: Any) -> Any:
            known = self.inputs[ending.linear].get(self.current.batch)
            return ending.wrap(self.layer.get_submodule(ending.linear)(known.to(self.device)))
        return run

    def close(self) -> None:
        for scratch in [*self.inputs.values(), *self.unchanged.values()]:
            scratch.close()
        for mixture in self.mixtures:
            mixture.close()


@cache
def _say_slow(kind: str, why: str) -> None:
    warn(f"layers of the kind {kind} run in float32, because their code does not run in bf16: {why}")


class Current(threading.local):
    """The worker of this thread: its number, its batch, the batch's number of sequences, and the layer's input states in
    it."""

    worker: int
    batch: int
    sequences: int
    hidden: torch.Tensor


def relative(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """x [n, seq_len, in] as float32 rows [tokens, in], each times its weight [tokens, 1]."""
    rows = x.reshape(-1, x.shape[-1])
    if weight is None:
        return rows.float()
    return rows.float().mul_(weight) if rows.dtype != torch.float32 else rows * weight  # mixed types multiply slowly


def total(parts: list[InputStatistics]) -> InputStatistics:
    """Add the statistics of all workers into those of the first, and fill the lower triangles (`add_gram` fills only the
    upper ones)."""
    first = parts[0]
    for other in parts[1:]:
        first.hessian += other.hessian
        first.tokens += other.tokens
        if first.drift is not None and other.drift is not None:
            first.drift += other.drift
        if first.variation is not None and other.variation is not None:
            first.variation.total(other.variation)
        if first.peak is not None and other.peak is not None:
            first.peak = torch.maximum(first.peak, other.peak)
        if other.drift_hessian is not None:
            assert first.drift_hessian is not None  # the first worker has the first batch
            first.drift_hessian += other.drift_hessian
    mirror_upper(first.hessian)
    if first.drift_hessian is not None:
        mirror_upper(first.drift_hessian)
    return first


def add_gram(hessian: torch.Tensor, x: torch.Tensor) -> None:
    """Add x^T x, for x [tokens, in], to the upper triangle of `hessian` [in, in]. Bands of rows halve the work."""
    n, step = x.shape[1], 256
    with fast_matmul():
        for i in range(0, n, step):
            hessian[i : i + step, i:].addmm_(x[:, i : i + step].t(), x[:, i:])


def mirror_upper(square: torch.Tensor) -> None:
    """Copy the upper triangle to the lower one in place, band by band, without a second matrix."""
    for i in range(0, square.shape[0], 256):
        band = square[i : i + 256, i:]
        corner = band[:, : band.shape[0]]
        corner.copy_(corner.triu() + corner.triu(1).t())
        square[i + band.shape[0] :, i : i + band.shape[0]] = band[:, band.shape[0] :].t()
