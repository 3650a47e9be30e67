"""The one layer-by-layer loop of every pass over the decoder layers.

    for each decoder layer:  read its weights → find the linears that share an input → gather what the pass needs about each
    input → let the pass change the weights → run the changed layer → store its output for the next layer

The loop knows no algorithm. A pass is a `LayerPass`, or a `LayerWatch` if it only reads: then every layer runs once and does
not change. A pass without text gathers no statistics: layers are read, changed and stored, and no layer is run.
Only one layer's weights are in memory.
Every finished layer and its output states are on the disk before the layer after the next one starts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmc.compress.arguments import LayerArguments
from llmc.compress.entering import enter
from llmc.compress.layer_run import LayerRun
from llmc.compress.mixture_run import MixtureRun
from llmc.compress.passes import LayerPass, LayerWatch
from llmc.compress.rows import Rows
from llmc.compress.skeleton import LinearGroup, Skeleton
from llmc.compress.state_file import load_state, save_state
from llmc.compress.states import StateStore, batches_of
from llmc.compress.tracing import trace_layer
from llmc.compress.unfinished import START_AGAIN, open_unfinished
from llmc.console import progress, warn
from llmc.errors import UserError
from llmc.files import fsync, write_sealed
from llmc.formats.linears import get_weight
from llmc.machine import give_back
from llmc.sealed import read_sealed

# The unchanged model also runs, on an eighth of the sequences and on at least 16. It does not run on all of them, because
# this second forward pass takes time. Error of the states after 13 layers of SmolLM2-135M (128 sequences): 1.55 % with 32
# sequences and 1.63 % with 16; with one GPTQ refinement instead of two, 1.60 % and 1.56 %.
REFERENCE_SHARE, REFERENCE_LEAST = 8, 16
BATCH_BYTES = 32 << 20  # activations of one batch of sequences (hidden states and the widest linear), float32
SUMS_BYTES = 512 << 20  # three matrices [in, in] for the widest linear, over all workers


@dataclass(frozen=True)
class LoopSettings:
    """batch: number of sequences in a batch.  true_sequential: gather each group's statistics after the earlier groups were
    changed; else gather all of them on the unchanged layer.  reference: number of sequences (the first ones, in whole
    batches) that also run through the unchanged model, for `drift`; 0 for none.  workers: number of batches that run in
    parallel.  peaks: store each column's largest |x| too."""

    batch: int = 8
    true_sequential: bool = True
    reference: int = 0
    workers: int = 1
    peaks: bool = False


def sequences_at_once(skeleton: Skeleton, seq_len: int, workers: int = 1) -> int:
    """The batch size of each worker, so that the activations of all workers take about BATCH_BYTES."""
    widest = max(max(shape) for layer in skeleton.shapes for shape in layer)
    return max(1, min(16, BATCH_BYTES // (seq_len * widest * 4 * workers)))


def workers_for(skeleton: Skeleton) -> int:
    """How many batches to run in parallel: on a CPU one per thread, as long as the workers' sums fit SUMS_BYTES; else 1."""
    widest = skeleton.widths[-1]
    return 1 if skeleton.device.type != "cpu" else max(1, min(torch.get_num_threads(), SUMS_BYTES // (12 * widest * widest)))


def settings_for(skeleton: Skeleton, sequences: torch.Tensor | None, workers: int | None = None, **more: Any) -> LoopSettings:
    """Settings of a loop over `sequences`, with the largest batch that the memory bounds allow. workers: None takes the
    largest number that they allow.  more: other fields of LoopSettings."""
    if sequences is None:
        return LoopSettings(**more)
    workers = workers or workers_for(skeleton)
    return LoopSettings(sequences_at_once(skeleton, sequences.shape[1], workers), workers=workers, **more)


class Workspace:
    """The folder of an unfinished run: `state.json`, `layers/`, the hidden states. unfinished.py checks its fingerprint."""

    def __init__(self, folder: Path, fingerprint: dict[str, Any], resume: bool) -> None:
        open_unfinished(folder, fingerprint, resume)
        self.folder, self.layers = folder, folder / "layers"
        found = folder / "state.json"
        self.state: dict[str, Any] = read_sealed(found, START_AGAIN) if os.path.lexists(found) else {"done": 0}
        self.layers.mkdir(parents=True, exist_ok=True)
        for index in range(self.done):  # a damaged one is found now
            self.tensors(index)
            read_sealed(self.record_file(index), START_AGAIN)

    @property
    def done(self) -> int:
        """The number of layers that are finished and on the disk."""
        return int(self.state["done"])

    def save_layer(self, index: int, tensors: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
        save_state(self.layer_file(index), tensors)
        write_sealed(self.record_file(index), record)

    def commit(self, done: int, side: int = 0, checksums: list[int] | None = None, **more: Any) -> None:
        self.state |= {"done": done, "side": side, "checksums": checksums or [], **more}
        write_sealed(self.folder / "state.json", self.state)
        fsync(self.folder)

    def layer_file(self, index: int) -> Path:
        return self.layers / f"{index:04d}.safetensors"

    def record_file(self, index: int) -> Path:
        return self.layer_file(index).with_suffix(".json")

    def tensors(self, index: int) -> dict[str, torch.Tensor]:
        """What `save_layer` kept of a layer. Raises UserError if it is damaged."""
        return load_state(self.layer_file(index))[0]

    def records(self) -> list[dict[str, Any]]:
        return [read_sealed(p, START_AGAIN) for p in sorted(self.layers.glob("*.json"))]


class Streams:
    """The hidden states of the sequences at the present layer, in files. A resumed run reads them again.

    sequences: int64 [n, seq_len], or None if no text is run; then there are no streams.
    lengths: {name of a stream: number of its sequences}; the first stream has all sequences.
    arguments: the keyword arguments that the model passes to each layer.  given: those of them that depend on the text.
    """

    def __init__(self, skeleton: Skeleton, sequences: torch.Tensor | None, work: Workspace, lengths: dict[str, int],
                 batch: int) -> None:
        self.work, self.stores, self.arguments = work, list[StateStore](), list[LayerArguments]()
        self.given = Rows(work.folder, "given", 0 if sequences is None else len(sequences))
        if sequences is None:
            return
        entered = enter(skeleton, (sequences[a:b] for a, b in batches_of(len(sequences), batch)), sequences.shape[1],
                        self.given)
        self.arguments = entered.layers
        self.stores = [StateStore(work.folder, name, n, entered.shape, batch, entered.axis) for name, n in lengths.items()]
        first, *others = self.stores
        if work.done:
            skeleton.leave()
            self._restore()
            return
        first.replace(entered.states)
        first.advance()
        for store in others:  # all streams start from the same states
            store.replace(first.read(a, b) for a, b in store.starts())
            store.advance()
        self.settle(0, self.side)

    @property
    def side(self) -> int:
        """The number of the file that each stream is read from."""
        return self.stores[0].side if self.stores else 0

    def advance(self) -> None:
        """Make the layer's output the input of the next layer."""
        for store in self.stores:
            store.advance()

    def settle(self, done: int, side: int) -> None:
        """Make the files `side` durable. From now on a resumed run starts from them, after the first `done` layers."""
        self.work.commit(done, side, [store.settle(side) for store in self.stores], given=self.given.settle(done),
                         carried=[store.carried.settle(done) for store in self.stores])
        for rows in (self.given, *(store.carried for store in self.stores)):
            rows.forget(done)

    def _restore(self) -> None:
        state = self.work.state
        found = [s.restore(state["side"], c) for s, c in zip(self.stores, state["checksums"], strict=True)]
        found += [s.carried.restore(c) for s, c in zip(self.stores, state["carried"], strict=True)]
        if not all([*found, self.given.restore(state["given"])]):
            raise UserError(f"the hidden states in {self.work.folder} are damaged", START_AGAIN)


def walk(skeleton: Skeleton, layers: Sequence[int], label: str, visit: Callable[[int, nn.Module], str],
         done: int = 0) -> None:
    """Load these layers one after another and call `visit(index, layer)` on each. It returns a short note for the progress
    line.

    done: number of layers that were finished before.
    """
    with progress(label, done + len(layers), done) as p:
        for index in layers:
            with skeleton.layer(index) as layer:
                note = visit(index, layer)
            give_back()
            p.step(note)


class Loop:
    """Runs a pass over every decoder layer of a skeleton. sequences: int64 [n, seq_len]; None for a pass without text: then
    no layer is run and no statistics are gathered."""

    def __init__(self, skeleton: Skeleton, sequences: torch.Tensor | None, work: Workspace, settings: LoopSettings) -> None:
        self.skeleton, self.work, self.settings = skeleton, work, settings
        count = 0 if sequences is None else len(sequences)
        reference = min(count, -(-settings.reference // settings.batch) * settings.batch)
        lengths = {"hidden": count, **({"reference": reference} if reference else {})}
        self.streams = Streams(skeleton, sequences, work, lengths, settings.batch)

    def run(self, pass_: LayerPass | LayerWatch, note: Callable[[dict[str, Any]], str] = lambda record: "",
            label: str = "layer") -> None:
        """Run the pass over every layer that is not finished yet. note: from a layer's record to a short note for the
        progress line.

        A layer's states are written to the disk while the next layer runs. The layer after that waits until they are there.
        """
        settled: list[Future[None]] = []

        def visit(index: int, layer: nn.Module) -> str:
            record = self._one(pass_, index, layer)
            self.streams.advance()
            while settled:
                settled.pop().result()
            settled.append(disk.submit(self.streams.settle, index + 1, self.streams.side))
            return note(record)

        with ThreadPoolExecutor(1) as disk, torch.no_grad():
            walk(self.skeleton, range(self.work.done, len(self.skeleton.layers)), label, visit, self.work.done)
            for last in settled:
                last.result()

    def _one(self, pass_: LayerPass | LayerWatch, index: int, layer: nn.Module) -> dict[str, Any]:
        """Run the pass over one layer and write its output states. Returns the layer's record."""
        experts, events = dict[str, Any](), list[str]()
        if self.streams.stores:
            experts, events = self._with_text(pass_, index, layer)
        else:
            assert isinstance(pass_, LayerPass), "there is nothing to watch without text"
            groups = pass_.groups(layer)
            pass_.begin(index, layer, groups)
            for group in groups:
                with self.skeleton.filled(layer.get_submodule(n) for n in group.names):
                    pass_.change(layer, group, None)
        tensors, record = pass_.finish(index, layer)
        if experts:
            record["experts"] = experts
        if events := [*events, *sparse(index, experts)]:
            record["events"] = [*record.get("events", ()), *events]
        self.work.save_layer(index, tensors, record)
        return record

    def _with_text(self, pass_: LayerPass | LayerWatch, index: int, layer: nn.Module) -> tuple[dict[str, Any], list[str]]:
        """Run the pass over one layer with text, and run the layer. Returns (what reached its experts, by their module;
        sentences for the record)."""
        store, arguments, settings = self.streams.stores[0], self.streams.arguments[index], self.settings
        trace = trace_layer(layer, store.read(0, 1).to(self.skeleton.device), lambda: arguments.call(0, 1, store.carried))
        run = LayerRun(layer, arguments, trace, store, self.work.folder, settings.true_sequential, settings.workers,
                       settings.peaks)
        groups = [*trace.groups, *(g for m in run.mixtures for n in range(m.experts.count) for g in m.groups(n))]
        ran = {name for group in groups for name in group.names}
        idle = [LinearGroup((name,), get_weight(linear).shape[1]) for name, linear in self.skeleton.linears(index).items()
                if name not in ran and f"{self.skeleton.layer_name(index)}.{name}" not in self.skeleton.kept]
        events = self._idle(pass_, index, [group.names[0] for group in idle])
        pass_.begin(index, layer, [*groups, *idle])
        try:
            if isinstance(pass_, LayerWatch):
                run.watch(pass_.see)
            else:
                self._change(pass_, layer, run, idle)
            return {mixture.name: mixture.coverage(store) for mixture in run.mixtures}, events
        finally:
            run.close()

    def _idle(self, pass_: LayerPass | LayerWatch, index: int, names: list[str]) -> list[str]:
        """What the record says of linears whose input is not seen. UserError if the pass only reads inputs."""
        if not names:
            return []
        if isinstance(pass_, LayerWatch):
            raise UserError(f"{self.skeleton.layer_name(index)}.{names[0]} did not run on the calibration text",
                            "`llmc quantize` rounds such a linear to nearest")
        event = f"{', '.join(names)}: not seen on the calibration text, so changed without statistics"
        warn(f"layer {index}: {event}")
        return [event]

    def _change(self, pass_: LayerPass, layer: nn.Module, run: LayerRun, idle: list[LinearGroup]) -> None:
        """Let the pass change every group, then run the changed layer. idle: groups whose input is not seen."""
        for reference in self.streams.stores[1:]:
            run.keep_unchanged_inputs(reference)
        for group in idle:
            with self.skeleton.filled(layer.get_submodule(n) for n in group.names):
                pass_.change(layer, group, None)
        for stage in stages(run, self.settings.true_sequential):
            if isinstance(stage, MixtureRun):
                run.change_experts(stage, lambda group, statistics: pass_.change(layer, group, statistics))
                continue
            for group, statistics in zip(stage, run.gather(stage), strict=True):
                pass_.change(layer, group, statistics)
        run.write_outputs()


def sparse(index: int, experts: dict[str, Any]) -> list[str]:
    """Sentences on the experts of a layer that few tokens reached."""
    found = []
    for name, seen in experts.items():
        if seen["starved"]:
            tokens = seen["tokens"]
            least = min(range(len(tokens)), key=tokens.__getitem__)
            found.append(f"{name}: {seen['starved']} of {len(tokens)} experts saw fewer tokens than they have columns "
                         f"({seen['unseen']} none; least: expert {least} of layer {index} saw {tokens[least]} tokens, "
                         f"{tokens[least] / seen['columns']:.1f} per column): their statistics lean on the layer's")
            warn(f"layer {index}: {found[-1]}")
    return found


def stages(run: LayerRun, sequential: bool) -> list[list[LinearGroup] | MixtureRun]:
    """What is changed one after another in a layer: groups of linears, and modules of experts. Beside experts the groups
    are always changed one after another, because the layer cannot run through its experts for each of them."""
    if not run.mixtures:
        return [[g] for g in run.groups] if sequential else [run.groups]
    found: list[list[LinearGroup] | MixtureRun] = []
    for position in range(len(run.groups) + 1):
        found += [m for m in run.mixtures if m.after == position]
        found += [[g] for g in run.groups[position : position + 1]]
    return found


def spread(sequences: torch.Tensor, first: int) -> torch.Tensor:
    """Reorder the sequences so that the first `first` of them are evenly spaced over all."""
    n = sequences.shape[0]
    chosen = [i * n // first for i in range(first)]
    return sequences[chosen + sorted(set(range(n)) - set(chosen))]
