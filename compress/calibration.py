"""The one layer-by-layer loop of every pass that looks at activations.

    for each decoder layer:  read its weights → find the linears that share an input → gather what the pass needs about each
    input → let the pass change the weights → run the layer as it will ship → keep its output for the next layer

The loop knows no algorithm: a pass is an object with the methods of `LayerPass`, or of `LayerWatch` if it only looks: then
every layer runs once and stays as it is. Only one layer's weights are in memory.
Every finished layer and the states that leave it are on the disk before the next one starts.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors.torch import save_file
from torch import nn

from llmc.compress.layer_run import InputStatistics, LayerRun
from llmc.compress.skeleton import LinearGroup, Skeleton, get_weight, trace_layer
from llmc.compress.states import StateStore
from llmc.compress.unfinished import open_unfinished
from llmc.console import progress
from llmc.errors import UserError
from llmc.files import fsync, staged_file, write_json

BATCH_BYTES = 32 << 20  # activations of one batch of sequences (hidden and the widest linear), float32
SUMS_BYTES = 512 << 20  # three matrices [in, in] for the widest linear, of all workers


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
    the unchanged model too, for `drift`; 0 for none.  workers: how many batches run side by side.  peaks:
    keep each column's largest value too."""

    batch: int = 8
    true_sequential: bool = True
    reference: int = 0
    workers: int = 1
    peaks: bool = False


def sequences_at_once(skeleton: Skeleton, seq_len: int, workers: int = 1) -> int:
    """How many sequences, for each worker, keep a layer's activations near BATCH_BYTES together."""
    widest = max(max(get_weight(m).shape) for m in skeleton.linears(0).values())
    return max(1, min(16, BATCH_BYTES // (seq_len * widest * 4 * workers)))


def workers_for(skeleton: Skeleton) -> int:
    """How many batches to run side by side: one a thread on a CPU, while the workers' sums stay under SUMS_BYTES."""
    widest = max(get_weight(m).shape[1] for m in skeleton.linears(0).values())
    return 1 if skeleton.device.type != "cpu" else max(1, min(torch.get_num_threads(), SUMS_BYTES // (12 * widest * widest)))


class Workspace:
    """The folder of an unfinished run: `state.json`, `layers/`, the hidden states (unfinished.py says what guards it)."""

    def __init__(self, folder: Path, fingerprint: dict[str, Any], resume: bool) -> None:
        open_unfinished(folder, fingerprint, resume)
        self.folder, self.layers = folder, folder / "layers"
        found = folder / "state.json"
        self.state: dict[str, Any] = json.loads(found.read_text(encoding="utf-8")) if found.is_file() else {"done": 0}
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
        run = LayerRun(layer, arguments, trace, self.store, self.work.folder, self.settings.true_sequential,
                       self.settings.workers, self.settings.peaks)
        try:
            if isinstance(pass_, LayerWatch):
                run.watch(pass_.see)
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
            run.refer(self.reference)
        for stage in [[g] for g in run.groups] if self.settings.true_sequential else [run.groups]:
            for group, statistics in zip(stage, run.gather(stage), strict=True):
                pass_.change(layer, group, statistics)
        run.send()
