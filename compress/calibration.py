"""The one layer-by-layer loop of every pass that looks at activations.

    for each decoder layer:  read its weights → find the linears that share an input → gather what the pass needs about each
    input → let the pass change the weights → run the layer as it will ship → keep its output for the next layer

The loop knows no algorithm: a pass is an object with the methods of `LayerPass`, or of `LayerWatch` if it only looks: then
every layer runs once and stays as it is. Only one layer's weights are in memory.
Every finished layer and the states that leave it are on the disk before the next one starts.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors.torch import save_file
from torch import nn

from llmc.artifact import fsync, staged_file, write_json
from llmc.compress.precision import fast_forward, fast_matmul, matmul_precision
from llmc.compress.skeleton import (
    Ending,
    LayerTrace,
    LinearGroup,
    Skeleton,
    StopForward,
    get_weight,
    replaced,
    trace_layer,
)
from llmc.compress.states import Scratch, StateStore
from llmc.console import progress
from llmc.errors import UserError

BATCH_BYTES = 32 << 20  # activations of one batch of sequences (hidden and the widest linear), float32


@dataclass
class InputStatistics:
    """What a group of linears sees.

    hessian: float32 [in, in], the sum of x x^T over tokens (the 2 of the paper's definition is left out: it cancels)
    drift, drift_hessian: float32 [in, in], the sums of (x' - x) x^T and of x x^T over the sequences that the unchanged model
    ran along on, where x' is what the same linear sees there; None where it ran on none. They belong together: drift under
    the Hessian of other tokens over- or undershoots wherever a few tokens dominate.
    tokens: how many x there were
    peak: float32 [in], the largest |x| of each column, of x as the linear sees it

    Inputs of linears that write to the residual stream (those that end a child module of the layer) are divided by the
    root mean square of the stream at their token, as it enters the layer or with what the linear adds, whichever is larger:
    what follows normalises the stream, so an error counts relative to it, and the few tokens with enormous states do not
    drown the others. (Where a layer makes those states, only the second is large.)
    """

    hessian: torch.Tensor
    tokens: int = 0
    peak: torch.Tensor | None = None
    drift: torch.Tensor | None = None
    drift_hessian: torch.Tensor | None = None


class LayerPass(Protocol):
    """What the loop asks of a pass."""

    def begin(self, index: int, layer: nn.Module, groups: list[LinearGroup]) -> None:
        """A layer is in memory; `groups` are all of its linears that ran. Raise UserError if the pass cannot serve it."""

    def change(self, layer: nn.Module, group: LinearGroup, statistics: InputStatistics) -> None:
        """Change the weights of the group's linears in place."""

    def finish(self, index: int, layer: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """(tensors to keep, by their names in the output checkpoint; what to record about the layer)."""


@runtime_checkable
class LayerWatch(Protocol):
    """What the loop asks of a pass that changes nothing. `begin` and `finish` as of `LayerPass`."""

    def begin(self, index: int, layer: nn.Module, groups: list[LinearGroup]) -> None: ...

    def see(self, group: LinearGroup, inputs: torch.Tensor) -> None:
        """One batch [n, seq_len, in] of what the group's linears are given, as it is."""

    def finish(self, index: int, layer: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, Any]]: ...


@dataclass(frozen=True)
class LoopSettings:
    """batch: sequences run at once.  true_sequential: gather each group's statistics after the groups before it were
    changed, not all of them on the unchanged layer.  reference: the first so many sequences (whole batches) run through
    the unchanged model too, for `drift`; 0 for none."""

    batch: int = 8
    true_sequential: bool = True
    reference: int = 0


def sequences_at_once(skeleton: Skeleton, seq_len: int) -> int:
    """How many sequences keep a layer's activations near BATCH_BYTES."""
    widest = max(max(get_weight(m).shape) for m in skeleton.linears(0).values())
    return max(1, min(16, BATCH_BYTES // (seq_len * widest * 4)))


class Workspace:
    """The folder of an unfinished run: `state.json`, `layers/`, the hidden states. Guarded by a fingerprint."""

    def __init__(self, folder: Path, fingerprint: dict[str, Any], resume: bool) -> None:
        self.folder, self.layers = folder, folder / "layers"
        self.state: dict[str, Any] = {"fingerprint": fingerprint, "done": 0}
        found = folder / "state.json"
        if resume and found.is_file():
            old = json.loads(found.read_text(encoding="utf-8"))
            differing = sorted(k for k in {*fingerprint, *old["fingerprint"]}
                               if fingerprint.get(k) != old["fingerprint"].get(k))
            if differing:
                raise UserError(f"cannot resume: the unfinished run in {folder} differs in {', '.join(differing)}",
                                "run with the same model and options, or without --resume to start again")
            self.state = old
        else:
            shutil.rmtree(folder, ignore_errors=True)
        self.layers.mkdir(parents=True, exist_ok=True)

    @property
    def done(self) -> int:
        """Layers that are finished and on the disk."""
        return int(self.state["done"])

    def save_layer(self, index: int, tensors: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
        with staged_file(self.layer_file(index)) as tmp:
            save_file({k: v.contiguous() for k, v in tensors.items()}, tmp, metadata={"format": "pt"})
        write_json(self.layer_file(index).with_suffix(".json"), record)

    def commit(self, done: int, side: int = 0, checksums: list[int] | None = None) -> None:
        self.state |= {"done": done, "side": side, "checksums": checksums or []}
        write_json(self.folder / "state.json", self.state)
        fsync(self.folder)

    def layer_file(self, index: int) -> Path:
        return self.layers / f"{index:04d}.safetensors"

    def records(self) -> list[dict[str, Any]]:
        files = sorted(self.layers.glob("*.json"))
        return [json.loads(p.read_text(encoding="utf-8")) for p in files]


class Loop:
    """Runs a pass over every decoder layer of a skeleton."""

    def __init__(self, skeleton: Skeleton, sequences: torch.Tensor, work: Workspace, settings: LoopSettings) -> None:
        self.skeleton, self.work, self.settings = skeleton, work, settings
        hidden = skeleton.config.get_text_config().hidden_size
        shape = (sequences.shape[0], sequences.shape[1], hidden)
        self.store = StateStore(work.folder, "hidden", shape, settings.batch)
        along = min(shape[0], -(-settings.reference // settings.batch) * settings.batch)
        self.reference = StateStore(work.folder, "reference", (along, *shape[1:]), settings.batch) if along else None
        self.stores = [s for s in (self.store, self.reference) if s is not None]
        batches = (sequences[a:b] for a, b in self.store.starts())
        self.arguments, entering = skeleton.enter(batches, sequences.shape[1])
        state = work.state
        if work.done == 0:
            self.store.replace(entering)
            self.store.advance()
            if self.reference is not None:  # both streams start from the same states
                self.reference.replace(self.store.read(a, b) for a, b in self.reference.starts())
                self.reference.advance()
            self._settle(0, self.store.side)
        elif not all(s.restore(state["side"], c) for s, c in zip(self.stores, state["checksums"], strict=True)):
            raise UserError(f"the hidden states in {work.folder} are damaged", "run without --resume to start again")
        else:
            skeleton.leave()

    def _settle(self, done: int, side: int) -> None:
        """From here on a resumed run starts after layer `done`."""
        self.work.commit(done, side, [store.settle(side) for store in self.stores])

    def run(self, pass_: LayerPass | LayerWatch, done: Callable[[dict[str, Any]], str]) -> None:
        """Every layer that is not finished yet. `done` turns a layer's record into a short note for the progress line.

        A layer's states go to the disk while the next layer runs; no layer begins before those of the last but one are there.
        """
        layers = len(self.skeleton.layers)
        settled: Future[None] | None = None
        with ThreadPoolExecutor(1) as disk, progress("layer", layers, self.work.done) as p, torch.no_grad():
            for index in range(self.work.done, layers):
                with self.skeleton.layer(index) as layer:
                    record = self._one(pass_, index, layer)
                for store in self.stores:
                    store.advance()
                if settled is not None:
                    settled.result()
                settled = disk.submit(self._settle, index + 1, self.store.side)
                p.step(done(record))
            if settled is not None:
                settled.result()

    def _one(self, pass_: LayerPass | LayerWatch, index: int, layer: nn.Module) -> dict[str, Any]:
        """Returns the layer's record; the states that leave it are written."""
        arguments, device = self.arguments[index], self.skeleton.device
        trace = trace_layer(layer, self.store.read(0, 1).to(device), arguments)
        ran = {name for group in trace.groups for name in group.names}
        if idle := sorted(set(self.skeleton.linears(index)) - ran):
            raise UserError(f"{self.skeleton.layer_name(index)}.{idle[0]} did not run on the calibration text",
                            "mixtures of experts are not supported yet")
        pass_.begin(index, layer, trace.groups)
        run = LayerRun(layer, arguments, trace, self.store, self.work.folder, self.settings.true_sequential)
        try:
            if isinstance(pass_, LayerWatch):
                self.store.replace(run.watch(self.store, pass_.see))
            else:
                self._change(pass_, layer, run)
        finally:
            run.close()
        tensors, record = pass_.finish(index, layer)
        self.work.save_layer(index, tensors, record)
        return record

    def _change(self, pass_: LayerPass, layer: nn.Module, run: LayerRun) -> None:
        """Let the pass work on every group, then run the layer as it ships."""
        if self.reference is not None:
            self.reference.replace(run.refer(self.reference))
        for stage in [[g] for g in run.groups] if self.settings.true_sequential else [run.groups]:
            for group, statistics in zip(stage, run.gather(stage), strict=True):
                pass_.change(layer, group, statistics)
        self.store.replace(run.outputs())


class LayerRun:
    """One layer, run over all sequences once for each group and once for its output.

    scratch: a folder for inputs of linears.  sequential: groups are worked on one after another. Then no linear runs twice:
    once the input of the linear that ends a child module is known, the module is replaced by that linear on that input (in
    a Llama layer the attention runs once, not four times). That is right only when everything before the linear is final.
    """

    def __init__(self, layer: nn.Module, arguments: dict[str, Any], trace: LayerTrace, store: StateStore, scratch: Path,
                 sequential: bool) -> None:
        self.layer, self.arguments, self.store = layer, arguments, store
        self.groups, self.batch = trace.groups, 0
        self.device = next(layer.parameters()).device
        dtype = torch.bfloat16 if matmul_precision() == "bf16" else torch.float32
        self.writers = trace.writers
        self.endings = trace.endings if sequential else {}
        self.inputs = {e.linear: Scratch(scratch / f"input-{part}", dtype) for part, e in self.endings.items()}
        self.unchanged = {g.names[0]: Scratch(scratch / f"unchanged-{i}", dtype) for i, g in enumerate(trace.groups)}

    def refer(self, store: StateStore) -> Iterator[torch.Tensor]:
        """Run the unchanged layer over the reference's states: keeps the input of every group, yields the outputs."""
        return self.watch(store, lambda group, x: self.unchanged[group.names[0]].put(self.batch, x))

    def watch(self, store: StateStore, see: Callable[[LinearGroup, torch.Tensor], None]) -> Iterator[torch.Tensor]:
        """Run the layer as it is over a stream: `see` is shown the input of every group, the outputs are yielded."""
        handles = [self.layer.get_submodule(g.names[0]).register_forward_pre_hook(
            lambda _m, args, group=g: see(group, args[0])) for g in self.groups]
        try:
            yield from self._forward(store)
        finally:
            for handle in handles:
                handle.remove()

    def gather(self, groups: list[LinearGroup]) -> list[InputStatistics]:
        """Run every sequence up to the last of `groups` and sum what InputStatistics says over each group's input."""
        found = [self._nothing_yet(g) for g in groups]

        def hook(position: int) -> Any:
            name = groups[position].names[0]
            kept = self.inputs.get(name)

            def accumulate(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
                with torch.autocast(self.device.type, enabled=False):
                    self._add(found[position], name, args[0])
                if kept is not None:
                    kept.put(self.batch, args[0])
                if position == len(groups) - 1:
                    raise StopForward
            return accumulate

        handles = [self.layer.get_submodule(g.names[0]).register_forward_pre_hook(hook(i)) for i, g in enumerate(groups)]
        try:
            for _ in self.outputs():
                pass
        finally:
            for handle in handles:
                handle.remove()
        for statistics in found:
            mirror_upper(statistics.hessian)
            if statistics.drift_hessian is not None:
                mirror_upper(statistics.drift_hessian)
        return found

    def _nothing_yet(self, group: LinearGroup) -> InputStatistics:
        n = group.in_features
        found = InputStatistics(torch.zeros(n, n, device=self.device), peak=torch.zeros(n, device=self.device))
        if self.unchanged[group.names[0]].places:
            found.drift = torch.zeros(n, n, device=self.device)
        return found

    def _add(self, statistics: InputStatistics, name: str, x: torch.Tensor) -> None:
        """Add one batch x [n, seq_len, in] of the input of linear `name`."""
        weight = self._relative(name, x) if name in self.writers else None
        rows = x.reshape(-1, x.shape[-1])
        rows = rows.float() if weight is None else rows * weight  # float32 either way
        add_gram(statistics.hessian, rows)
        statistics.tokens += rows.shape[0]
        if statistics.peak is not None:
            statistics.peak = torch.maximum(statistics.peak, x.reshape(rows.shape).abs().amax(0).float())
        unchanged = self.unchanged[name]
        if statistics.drift is not None and self.batch in unchanged.places:
            apart = (unchanged.get(self.batch).to(self.device) - x).view(rows.shape)
            with fast_matmul():
                statistics.drift.addmm_((apart.float() if weight is None else apart * weight).t(), rows)
            if self.batch == len(unchanged.places) - 1:
                statistics.drift_hessian = statistics.hessian.clone()  # of just the batches with a reference: they come first

    def _relative(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """One over the root mean square of the residual stream at each token, [tokens, 1]: see InputStatistics."""
        linear: Any = self.layer.get_submodule(name)
        with fast_forward(self.device):
            added = nn.functional.linear(x, get_weight(linear), linear.bias)
        squares = torch.maximum(self.hidden.square().mean(-1), (self.hidden + added).square().mean(-1))
        return squares.clamp_min_(1e-12).rsqrt_().view(-1, 1)

    def outputs(self) -> Iterator[torch.Tensor]:
        """What leaves the layer as it is now, batch by batch (nothing for a batch that a hook stopped)."""
        yield from self._forward(self.store)

    def _forward(self, store: StateStore) -> Iterator[torch.Tensor]:
        for batch, (first, last) in enumerate(store.starts()):
            self.batch = batch  # hooks and shortcuts work on this one
            hidden = store.read(first, last).to(self.device)
            self.hidden = hidden
            with replaced(self.layer, self._shortcuts()), fast_forward(self.device):
                try:
                    out = self.layer(hidden, **self.arguments)
                except StopForward:
                    continue
            yield (out[0] if isinstance(out, tuple) else out).float()

    def _shortcuts(self) -> dict[str, Callable[..., Any]]:
        """For the child modules whose last linear's input is known for this batch: that linear, and nothing before it."""
        forwards: dict[str, Callable[..., Any]] = {}
        for name, ending in self.endings.items():
            if self.batch in self.inputs[ending.linear].places:
                forwards[name] = self._ending(ending)
                forwards |= dict.fromkeys(ending.feeders, lambda states, *_args, **_kwargs: states)
        return forwards

    def _ending(self, ending: Ending) -> Callable[..., Any]:
        def run(*_args: Any, **_kwargs: Any) -> Any:
            known = self.inputs[ending.linear].get(self.batch)
            return ending.wrap(self.layer.get_submodule(ending.linear)(known.to(self.device)))
        return run

    def close(self) -> None:
        for scratch in [*self.inputs.values(), *self.unchanged.values()]:
            scratch.close()


def add_gram(hessian: torch.Tensor, x: torch.Tensor) -> None:
    """Add x^T x, for x [tokens, in], to the upper triangle of `hessian` [in, in], in bands: about half of the work."""
    n, step = x.shape[1], 256
    with fast_matmul():
        for i in range(0, n, step):
            hessian[i : i + step, i:].addmm_(x[:, i : i + step].t(), x[:, i:])


def mirror_upper(square: torch.Tensor) -> None:
    """Copy the upper triangle to the lower one in place, a band at a time (no second matrix)."""
    for i in range(0, square.shape[0], 256):
        band = square[i : i + 256, i:]
        corner = band[:, : band.shape[0]]
        corner.copy_(corner.triu() + corner.triu(1).t())
        square[i + band.shape[0] :, i : i + band.shape[0]] = band[:, band.shape[0] :].t()
