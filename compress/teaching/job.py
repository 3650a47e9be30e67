"""The steps of `llmc heal` and `llmc distill` around their training: open the models, load the text, write the result.

The result is the student's folder with the tensors that changed; its other tensors stay byte for byte. During the run a
hidden folder beside the output holds the data for `--resume`, with a fingerprint of all settings and inputs that affect the
result.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file

from llmc.compress.sampling import BATCH, sample_from_model
from llmc.compress.state_file import load_state, save_state
from llmc.compress.teaching.models import load_teacher
from llmc.compress.teaching.teacher import Cached, Running, Teacher
from llmc.compress.teaching.texts import Texts, TextSettings, gather, named_texts
from llmc.compress.unfinished import fingerprint, open_unfinished
from llmc.console import say
from llmc.errors import UserError
from llmc.formats import model_folder
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.hf import load_config, load_tokenizer, load_torch_model
from llmc.formats.manifest import passes_of, read_manifest
from llmc.formats.shards import pieces_of, rest_of
from llmc.formats.source import describe_source
from llmc.precision import training_dtype
from llmc.temporary import remove


class Settings(TextSettings, Protocol):
    """The options that `llmc heal` and `llmc distill` have in common."""

    @property
    def teacher_top_k(self) -> int | None: ...
    @property
    def precision(self) -> str: ...
    @property
    def resume(self) -> bool: ...
    def numbers(self) -> dict[str, Any]: ...


class Job(ABC):
    """A training of a student by a teacher. name: of the pass in the manifest.  out: the folder to write."""

    name: str
    processes = 1  # number of processes that train together
    answers_only = False  # learn only the assistant's messages

    def __init__(self, folder: Path, teacher: Path, config: Settings, threads: int, out: Path, device: torch.device) -> None:
        self.folder, self.teacher_folder, self.settings, self.threads = folder, teacher, config, threads
        self.out, self.device = out, device
        self.work = out.with_name(f".{out.name}.unfinished")
        self.checkpoint = Checkpoint.open(folder)
        self.dtype = training_dtype(config.precision, device)

    @abstractmethod
    def run(self) -> dict[str, Any]:
        """Train and write the result. Returns the result that the command prints."""

    @property
    def leads(self) -> bool:
        """Whether this process writes the files. Of several processes one does."""
        return True

    def leader_first(self) -> AbstractContextManager[Any]:
        """A context that the process that writes runs before the others."""
        return nullcontext()

    def open_work(self) -> None:
        """Open the folder of the unfinished run and check its fingerprint."""
        self.source, self.teacher_source = describe_source(self.folder), describe_source(self.teacher_folder)
        rows = min(load_config(folder).get_text_config().vocab_size for folder in (self.folder, self.teacher_folder))
        self.named = named_texts(self.settings, load_tokenizer(self.folder), self.answers_only, rows)
        key = fingerprint(type(self).__module__, self.settings.numbers(), self.threads, self.source["files"],
                          device=str(self.device), dtype=str(self.dtype), teacher=self.teacher_source["files"],
                          processes=self.processes, texts=[t.origin["sha256"] for t in self.named])
        with self.leader_first():
            open_unfinished(self.work, key, self.settings.resume or not self.leads)

    def texts(self) -> Texts:
        """The sequences for training and the held-out ones."""
        return gather(self.settings, load_tokenizer(self.folder), self._sample, self.processes, self.answers_only,
                      named=self.named)

    def _sample(self, count: int) -> torch.Tensor:
        """Sample `count` sequences from the teacher, or read those of an interrupted run."""
        kept = self.work / "sampled.safetensors"
        with self.leader_first():
            if not kept.is_file():
                say(f"sampling {count} sequences of text from the teacher")
                model = load_torch_model(self.teacher_folder, str(self.device), torch.bfloat16)
                ids = sample_from_model(model, load_tokenizer(self.folder), count, self.settings.seq_len, self.settings.seed,
                                        BATCH)
                save_state(kept, {"ids": ids})
        return load_state(kept)[0]["ids"]

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Inside, models run in the precision of this job."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            yield

    def teacher(self, texts: Texts, vocab: int | None = None, temperature: float = 1.0) -> Teacher:
        """The running float model, or with --teacher-top-k its stored most likely tokens. In the second case the model leaves
        the memory after it has run over the text.

        vocab, temperature: see Running.
        """
        k = self.settings.teacher_top_k
        shape = (texts.sequences.shape[0], texts.sequences.shape[1])
        if k is not None and Cached.complete(self.work):
            return Cached(self.work, shape, k, self.device)
        model = load_teacher(self.teacher_folder, self.dtype).to(self.device)
        running = Running(model, texts.sequences, texts.held_out, self.forward, vocab, temperature)
        if k is None:
            return running
        rows = vocab or model.get_output_embeddings().weight.shape[0]
        if k > rows:
            raise UserError(f"--teacher-top-k {k}: the model has {rows} tokens", f"use --teacher-top-k {rows} or less")
        with self.leader_first():
            cached = Cached(self.work, shape, k, self.device)
            if not Cached.complete(self.work):
                cached.fill(running)
        return cached

    def publish(self, kind: str, changed: dict[str, torch.Tensor], texts: Texts, result: dict[str, Any]) -> dict[str, Any]:
        """Write the student's folder with its changed tensors and the manifest. Returns the printed result."""
        file, folder = self.work / "changed.safetensors", self.work / "artifact"
        save_file(changed, file)
        new = pieces_of(file)
        model_folder.write(folder, self.folder, rest_of(self.checkpoint, changed) + new, None, model_folder.same_bytes(new))
        entry = {"name": self.name, "config": self.settings.numbers(), "threads": self.threads, "device": str(self.device),
                 "precision": str(self.dtype).removeprefix("torch."), "teacher": self.teacher_source,
                 "texts": texts.origins, **result}
        origin = (read_manifest(self.folder) or {}).get("source") or self.source
        manifest = model_folder.publish(folder, self.out, kind, origin, [*passes_of(self.folder), entry])
        remove(self.work)
        return {"out": str(self.out), **{k: v for k, v in result.items() if k not in ("losses", "layers")},
                "texts": [{"name": o["name"], "share": o["share"]} for o in texts.origins],
                "weights_sha256": model_folder.weight_hashes(manifest)}
