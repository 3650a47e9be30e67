"""What the teacher says: run beside the student, or its likeliest tokens read back from the disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from llmc.compress.teaching.loss import Aims, Part, TopK, Whole
from llmc.compress.teaching.models import head_of, hidden_states
from llmc.console import progress
from llmc.files import write_json


class Teacher(Protocol):
    """A source of aims."""

    def of(self, rows: list[int]) -> Aims:
        """For these sequences of the text."""


class Running:
    """The float model itself. It keeps the hidden states of the first `keep` sequences, which are asked for again and again.

    sequences: int64 [n, seq_len].  forward: a context in which models run in the right precision.  vocab: how many of its
    logits count (None: all).  temperature: that they are divided by.
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

        def aims(part: Part) -> Whole:
            with torch.inference_mode(), self.forward(), head_of(self.model) as head:
                logits = head(flat[part][None])[:, : self.vocab]
                return Whole(logits if self.temperature == 1 else logits / self.temperature)
        return aims


class Cached:
    """The teacher's `k` likeliest tokens at every position with their log-probabilities, and the log of what is left, in
    files: 8 k + 4 bytes a token. It is run over the text once, and not needed after."""

    def __init__(self, folder: Path, shape: tuple[int, int], k: int, device: torch.device) -> None:
        self.folder, self.shape, self.k, self.device = folder, shape, k, device
        self.logs, self.ids, self.rest = (self._file(name) for name in ("logs", "ids", "rest"))

    def _file(self, name: str) -> np.ndarray:
        path = self.folder / f"teacher.{name}.npy"
        if self.complete(self.folder):
            return np.load(path, mmap_mode="r")
        last = () if name == "rest" else (self.k,)
        dtype = np.int32 if name == "ids" else np.float32
        return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(*self.shape, *last))

    @staticmethod
    def complete(folder: Path) -> bool:
        """Whether the files of an interrupted run are all there."""
        return (folder / "teacher.json").is_file()

    def fill(self, running: Running) -> None:
        """Run the teacher over every sequence."""
        with progress("the teacher's likeliest tokens, sequence", self.shape[0]) as p:
            for row in range(self.shape[0]):
                aims = running.of([row])
                for first in range(0, self.shape[1], 64):
                    part = slice(first, first + 64)
                    aim = TopK.of(aims(part), self.k)
                    self.logs[row, part], self.ids[row, part] = aim.logs.cpu().numpy(), aim.ids.int().cpu().numpy()
                    self.rest[row, part] = aim.rest.cpu().numpy()
                p.step()
        for file in (self.logs, self.ids, self.rest):
            file.flush()  # type: ignore[attr-defined]
        write_json(self.folder / "teacher.json", {"top_k": self.k})

    def of(self, rows: list[int]) -> Aims:
        logs, ids, rest = (torch.from_numpy(np.ascontiguousarray(f[rows])).to(self.device).flatten(0, 1)
                           for f in (self.logs, self.ids, self.rest))
        return lambda part: TopK(logs[part], ids[part].long(), rest[part])
