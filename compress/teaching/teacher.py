"""The teacher's next-token distributions: from a model in memory, or from the most likely tokens stored on the disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from llmc.compress.states import checksum
from llmc.compress.teaching.loss import Part, SoftTargetsOf, TopK, Whole
from llmc.compress.teaching.models import head_of, hidden_states
from llmc.compress.unfinished import START_AGAIN
from llmc.console import progress
from llmc.errors import UserError
from llmc.files import write_sealed
from llmc.sealed import read_sealed

DONE, FILES = "teacher.json", ("logs", "ids", "rest")  # of Cached


class Teacher(Protocol):
    """A source of soft targets."""

    def of(self, rows: list[int]) -> SoftTargetsOf:
        """The soft targets of the sequences `rows` of the text."""


class Running:
    """The float model in memory. It stores the hidden states of the first `keep` sequences (the held-out ones), because they
    are needed at every check.

    sequences: int64 [n, seq_len].  forward: a context in which models run in the right precision.  vocab: number of logits
    that are compared (the first ones); None means all.  temperature: the logits are divided by it.
    """

    def __init__(self, model: Any, sequences: torch.Tensor, keep: int, forward: Callable[[], Any], vocab: int | None = None,
                 temperature: float = 1.0) -> None:
        self.model, self.sequences, self.keep, self.forward = model, sequences, keep, forward
        self.vocab, self.temperature = vocab, temperature
        self.device = next(model.parameters()).device
        self.kept: dict[int, torch.Tensor] = {}

    def of(self, rows: list[int]) -> Callable[[Part], Whole]:
        with torch.inference_mode(), self.forward():
            if all(row < self.keep for row in rows):
                for row in rows:
                    if row not in self.kept:
                        self.kept[row] = hidden_states(self.model, self.sequences[[row]].to(self.device)).float()
                known = torch.cat([self.kept[row] for row in rows])
            else:
                known = hidden_states(self.model, self.sequences[rows].to(self.device)).float()
        flat = known.reshape(-1, known.shape[-1])

        def soft_targets(part: Part) -> Whole:
            with torch.inference_mode(), self.forward(), head_of(self.model) as head:
                logits = head(flat[part][None])[:, : self.vocab]
                return Whole(logits if self.temperature == 1 else logits / self.temperature)
        return soft_targets


class Cached:
    """The teacher's `k` most likely tokens at every position with their log-probabilities, and the log-probability of all
    others, in files: 8 k + 4 bytes per token. The teacher runs over the text once and is not needed afterwards."""

    def __init__(self, folder: Path, shape: tuple[int, int], k: int, device: torch.device) -> None:
        self.folder, self.shape, self.k, self.device = folder, shape, k, device
        if self.complete(folder):
            said = read_sealed(folder / DONE, START_AGAIN)
            if said != {"top_k": k, "files": self._checksums()}:
                raise UserError(f"what the teacher said, in {folder}, is damaged", START_AGAIN)
        self.logs, self.ids, self.rest = (self._file(name) for name in FILES)

    def _file(self, name: str) -> np.ndarray:
        path = self._path(name)
        if self.complete(self.folder):
            return np.load(path, mmap_mode="r")
        last = () if name == "rest" else (self.k,)
        dtype = np.int32 if name == "ids" else np.float32
        return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(*self.shape, *last))

    def _path(self, name: str) -> Path:
        return self.folder / f"teacher.{name}.npy"

    def _checksums(self) -> dict[str, int]:
        return {n: checksum(self._path(n)) if self._path(n).is_file() else 0 for n in FILES}

    @staticmethod
    def complete(folder: Path) -> bool:
        """Whether all files of an interrupted run are complete."""
        return os.path.lexists(folder / DONE)

    def fill(self, running: Running) -> None:
        """Run the teacher over every sequence and write the files."""
        with progress("the teacher's most likely tokens, sequence", self.shape[0]) as p:
            for row in range(self.shape[0]):
                soft_targets = running.of([row])
                for first in range(0, self.shape[1], 64):
                    part = slice(first, first + 64)
                    top = TopK.of(soft_targets(part), self.k)
                    self.logs[row, part], self.ids[row, part] = top.logs.cpu().numpy(), top.ids.int().cpu().numpy()
                    self.rest[row, part] = top.rest.cpu().numpy()
                p.step()
        for file in (self.logs, self.ids, self.rest):
            file.flush()  # type: ignore[attr-defined]
        write_sealed(self.folder / DONE, {"top_k": self.k, "files": self._checksums()})

    def of(self, rows: list[int]) -> SoftTargetsOf:
        logs, ids, rest = (torch.from_numpy(np.ascontiguousarray(f[rows])).to(self.device).flatten(0, 1)
                           for f in (self.logs, self.ids, self.rest))
        return lambda part: TopK(logs[part], ids[part].long(), rest[part])
