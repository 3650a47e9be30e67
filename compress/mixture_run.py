"""The experts of one layer in the calibration loop: one expert at a time, over all tokens that the router sends to it.

A layer of 128 experts does not fit into memory as floats, and no single batch reaches every expert. So the layer runs up to
its experts first, and what it gives them is kept in files: the input of every token, the numbers of its experts and their
weights. Then each expert is read once: its statistics are gathered, the pass changes it, and its outputs are added to a file.
After the last expert the layer runs on with these outputs.

A token counts with the square of its routing weight, because the model multiplies the expert's output by this weight. An
expert that few tokens reach has a poor Hessian H_e. It is shrunk towards the Hessian H that a sample of all tokens of the
layer gives at the same linear, each Hessian being the mean over its tokens:

    n H_e + STRENGTH * columns * H        (n tokens reached the expert)

This is a conjugate prior of STRENGTH tokens a column. An expert without tokens is changed with H alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmc.compress.skeleton import LinearGroup, StopForward
from llmc.compress.states import StateStore
from llmc.formats.mixture import Experts

STRENGTH = 0.25  # tokens a column; benchmarks/experts.py
ENOUGH = 16.0  # tokens a column from which the shrinking changes nothing that counts, and is left out
SAMPLE = 2048  # tokens of the layer for H
ROWS_BYTES = 64 << 20  # of the widest matrix of rows that is in memory at once
STARVED = 1.0  # fewer tokens a column are noted


@dataclass
class Sent:
    """What the router sent to the experts in one stream of sequences, and what they made of it.

    inputs, outputs: files of float32 [tokens, hidden].  index, weights: [tokens, chosen experts].
    """

    inputs: Path
    outputs: Path
    width: int
    index: torch.Tensor
    weights: torch.Tensor
    done: bool = False

    def put(self, first: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> None:
        """Keep what the router sends from token `first` on."""
        n = len(hidden)
        self.index[first : first + n], self.weights[first : first + n] = index.cpu(), weights.float().cpu()
        self._file(self.inputs, "r+")[first : first + n] = hidden.float().cpu().numpy()

    def rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """The inputs of these tokens, float32 [n, hidden]."""
        return torch.from_numpy(np.asarray(self._file(self.inputs, "r")[tokens.numpy()]))

    def add(self, tokens: torch.Tensor, made: torch.Tensor) -> None:
        """Add an expert's outputs [n, hidden], weighted, at these tokens (each at most once)."""
        file = self._file(self.outputs, "r+")
        file[tokens.numpy()] += made.cpu().numpy()

    def output(self, first: int, n: int) -> torch.Tensor:
        """The sum of the experts' outputs for tokens first … first + n - 1."""
        return torch.from_numpy(np.array(self._file(self.outputs, "r")[first : first + n]))

    def sent_to(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens int64 [n], their routing weights [n]) of one expert."""
        tokens, slots = torch.where(self.index == expert)
        return tokens, self.weights[tokens, slots]

    def close(self) -> None:
        self.inputs.unlink(missing_ok=True)
        self.outputs.unlink(missing_ok=True)

    def _file(self, path: Path, mode: Any) -> np.ndarray:
        # mapped for this access only: pages that stay mapped would count as memory of the process
        return np.memmap(path, np.float32, mode, shape=(len(self.index), self.width))


@dataclass
class MixtureRun:
    """The experts of one layer. name: inside the layer.  after: the number of groups of linears that run before it.
    precision: a context for the products on a device.  streams: {name of a store of hidden states: what was routed in it}."""

    name: str
    experts: Experts
    after: int
    folder: Path
    precision: Callable[[torch.device], AbstractContextManager[None]]
    streams: dict[str, Sent] = field(default_factory=dict)

    def recorder(self, store: StateStore, position: Callable[[], int]) -> Callable[..., Any]:
        """A forward that keeps its arguments and ends the layer's run. position: the first sequence of the present batch."""
        def record(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            if store.name not in self.streams:
                self._begin(store, hidden, index)
            self.streams[store.name].put(position() * store.shape[0], hidden, index, weights)
            raise StopForward
        return record

    def _begin(self, store: StateStore, hidden: torch.Tensor, index: torch.Tensor) -> None:
        """Make the files of a stream. hidden, index: of any batch, for their shapes."""
        tokens, name = store.count * store.shape[0], f"experts-{self.name.replace('.', '-')}-{store.name}"
        found = Sent(self.folder / f"{name}.in.f32", self.folder / f"{name}.out.f32", hidden.shape[1],
                       torch.zeros(tokens, index.shape[1], dtype=torch.int64), torch.zeros(tokens, index.shape[1]))
        for path in (found.inputs, found.outputs):
            with path.open("wb") as f:
                f.truncate(tokens * found.width * 4)
        self.streams[store.name] = found

    def answering(self, store: StateStore, position: Callable[[], int]) -> Callable[..., Any] | None:
        """A forward that returns the kept outputs; None if this stream has none yet."""
        routed = self.streams.get(store.name)
        if routed is None or not routed.done:
            return None

        def answer(hidden: torch.Tensor, *_args: Any) -> torch.Tensor:
            return routed.output(position() * store.shape[0], len(hidden)).to(hidden)
        return answer

    def run(self, store: StateStore, change: Callable[[int, Sent], None] | None = None) -> None:
        """Run every expert on the tokens of a stream and keep the sum of the outputs. change: called with the expert's number
        while it has its weights, before it runs."""
        routed = self.streams[store.name]
        for number in range(self.experts.count):
            if change is None and not len(routed.sent_to(number)[0]):
                continue
            with self.experts.ready(number):
                if change is not None:
                    change(number, routed)
                for inner, part, by in self.inputs(number, routed, last=True):
                    routed.add(part, self.outer(number, inner) * by[:, None].to(inner.device))
        routed.done = True

    def groups(self, number: int) -> tuple[LinearGroup, LinearGroup]:
        """The linears of one expert by their inputs: those that read the expert's input, and the last one."""
        first, last = self.experts.into(number), self.experts.out(number)
        widths = [self.experts.get_submodule(n).in_features for n in (first[0], last)]  # type: ignore[union-attr]
        return (LinearGroup(tuple(f"{self.name}.{n}" for n in first), int(widths[0])),  # type: ignore[arg-type]
                LinearGroup((f"{self.name}.{last}",), int(widths[1])))  # type: ignore[arg-type]

    def inputs(self, number: int, routed: Sent, last: bool,
               sample: bool = False) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """The inputs of one expert's linears in parts: (rows [n, in], tokens int64 [n], routing weights [n]). last: of the
        linear that makes the expert's output.  sample: of a sample of all tokens, with the weight 1, instead of those that
        are sent to it."""
        if sample:
            tokens = torch.arange(0, len(routed.index), max(1, len(routed.index) // SAMPLE))
            weights = torch.ones(len(tokens))
        else:
            tokens, weights = routed.sent_to(number)
        for part, by in self._parts(tokens, weights):
            x = routed.rows(part).to(self._device(number))
            if last:
                with self.precision(x.device):
                    x = self.experts.inner(number, x)
            yield x, part, by

    def outer(self, number: int, inner: torch.Tensor) -> torch.Tensor:
        """The expert's output float32 [n, hidden] for the input of its last linear, before the routing weights."""
        with self.precision(inner.device):
            return self.experts.outer(number, inner).float()

    def coverage(self, store: StateStore) -> dict[str, Any]:
        """What reached the experts: {'tokens': [of each expert], 'columns': inputs of its widest linear, 'starved': number
        of experts with fewer than STARVED tokens a column, 'unseen': number without tokens}."""
        tokens = torch.bincount(self.streams[store.name].index.flatten(), minlength=self.experts.count)[: self.experts.count]
        columns = max(g.in_features for g in self.groups(0))
        return {"tokens": tokens.tolist(), "columns": columns, "starved": int((tokens < STARVED * columns).sum()),
                "unseen": int((tokens == 0).sum())}

    def close(self) -> None:
        for routed in self.streams.values():
            routed.close()

    def _device(self, number: int) -> torch.device:
        return self.experts.get_submodule(self.experts.out(number)).weight.device  # type: ignore[return-value, union-attr]

    def _parts(self, tokens: torch.Tensor, weights: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        widest = max(max(p.shape) for p in self.experts.get_submodule("0").parameters())
        step = max(1, ROWS_BYTES // (4 * widest))
        yield from zip(tokens.split(step), weights.split(step), strict=True)
