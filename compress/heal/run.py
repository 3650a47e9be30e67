"""`llmc heal`: train the scales of a quantised model against the model it was made from.

The aim is the file that ships: codes stay bit for bit, scales end as fp16, so size, format and speed do not change. End to
end, what is minimised is the forward KL divergence from teacher to student over every position (Hinton et al., "Distilling
the Knowledge in a Neural Network", 2015, arXiv:1503.02531, at temperature 1); blocks.py says what a block is trained for. The
best scales by a held-out part of the text are kept, not the last; a run that never beats the start gives the start back and
says so.

Embedding and head are not trained: a quantised folder holds them in float, and their blocks are made by the export.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from llmc.artifact import (
    MANIFEST,
    check_disk,
    check_output,
    hash_folder,
    new_manifest,
    note_last,
    publish_folder,
    read_manifest,
    staged_file,
    write_json,
)
from llmc.checkpoint import Checkpoint
from llmc.compress.heal.blocks import Blocks
from llmc.compress.heal.config import HealConfig
from llmc.compress.heal.student import (
    called,
    load_student,
    load_teacher,
    moved,
    norm_weights,
    stored_tensors,
)
from llmc.compress.heal.teacher import Cached, Running, Teacher
from llmc.compress.heal.texts import Texts, gather
from llmc.compress.heal.train import EndToEnd
from llmc.compress.precision import matmul_precision, prepare_cpu
from llmc.compress.preparation import SAMPLING_BATCH
from llmc.compress.sampling import sample_from_model
from llmc.compress.skeleton import Skeleton
from llmc.compress.unfinished import fingerprint, open_unfinished
from llmc.console import say, warn
from llmc.errors import UserError
from llmc.export import quantized
from llmc.runtimes.targets.this_machine import physical_cores
from llmc.runtimes.torch_model import load_tokenizer, load_torch_model, torch_device
from llmc.shards import pieces_of, write_checkpoint
from llmc.sources import describe_source, resolve_model


def heal(model: str | Path, config: HealConfig) -> dict[str, Any]:
    """Heal the quantised folder `model`. Returns {'out', 'steps', 'best_step', 'kld': {'before', 'after'}, 'seconds', …}, or
    with scope 'block' 'error' (of the layers' outputs) instead of 'kld'."""
    start = time.monotonic()
    threads = config.threads or physical_cores()
    prepare_cpu(threads)
    job = _Job(resolve_model(model), resolve_model(config.teacher), config, threads)
    result = job.run()
    note_last(job.out, job.kind)
    return {**result, "seconds": round(time.monotonic() - start, 1)}


class _Job:
    """One healing: what is known before it starts, and the steps."""

    def __init__(self, folder: Path, teacher: Path, config: HealConfig, threads: int) -> None:
        self.folder, self.teacher_folder, self.config, self.threads = folder, teacher, config, threads
        self.out = config.out or folder.with_name(f"{folder.resolve().name}-healed")
        self.work = self.out.with_name(f".{self.out.name}.unfinished")
        self.checkpoint = Checkpoint.open(folder)
        if not quantized.linears(self.checkpoint):
            raise UserError(f"{folder} is a float model: there is nothing to heal", "run `llmc quantize` on it first")
        if Checkpoint.open(teacher).quantization is not None:
            raise UserError(f"the teacher {teacher} is quantised itself", "name the float model it was made from")
        _check_pair(self.checkpoint, Checkpoint.open(teacher))
        check_output(self.out)
        self.kind = "gptq" if (self.checkpoint.quantization or {}).get("quant_method") == "gptq" else "blocks"
        check_disk(self.out, self._disk_bytes(), "healing")
        self.device = torch_device(config.device)
        native = matmul_precision() == "bf16" or self.device.type != "cpu"
        precision = config.precision if config.precision != "auto" else "bf16" if native else "fp32"
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32

    def _disk_bytes(self) -> int:
        """The folder, its changed tensors and what a resumed run needs; the teacher's likeliest tokens, or both streams."""
        c, text = self.config, self.checkpoint.config
        tokens = (c.steps * c.batch * c.accumulate + c.held_out) * c.seq_len
        if c.scope == "block":
            more = 2 * 3 * 4 * tokens * int(text.get("hidden_size") or text.get("n_embd") or 0)
        else:
            more = tokens * (8 * c.teacher_top_k + 4) if c.teacher_top_k else 0
        return 3 * sum(p.stat().st_size for p in self.checkpoint.files) + more

    def run(self) -> dict[str, Any]:
        self._open()
        texts = gather(self.config, load_tokenizer(self.folder), self._sample)
        changed, result = self._blocks(texts) if self.config.scope == "block" else self._end_to_end(texts)
        return self._publish(changed, texts, result)

    def _open(self) -> None:
        """The folder of an unfinished run."""
        self.source, self.teacher_source = describe_source(self.folder), describe_source(self.teacher_folder)
        key = fingerprint(self.config.numbers(), self.threads, self.source["files"], device=str(self.device),
                          dtype=str(self.dtype), teacher=self.teacher_source["files"])
        open_unfinished(self.work, key, self.config.resume)

    def _sample(self, count: int) -> torch.Tensor:
        """So many sequences of the teacher's own text; a resumed run finds them."""
        kept = self.work / "sampled.safetensors"
        if not kept.is_file():
            say(f"sampling {count} sequences of healing text from the teacher")
            model = load_torch_model(self.teacher_folder, str(self.device), torch.bfloat16)
            ids = sample_from_model(model, load_tokenizer(self.folder), count, self.config.seq_len, self.config.seed,
                                    SAMPLING_BATCH)
            with staged_file(kept) as tmp:
                save_file({"ids": ids}, tmp)
        return load_file(kept)["ids"]

    @contextmanager
    def _forward(self) -> Iterator[None]:
        """Inside, models run in the precision of this job."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            yield

    def _end_to_end(self, texts: Texts) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Returns (the changed tensors by their names in the folder, what to report)."""
        c = self.config
        teacher = self._teacher(texts)  # before the student is there: it may be gone by then
        student, linears = load_student(self.folder, self.dtype, c.checkpointing)
        student.to(self.device)
        factors = {f"{name}.{kind}": p for name, m in linears.items() for kind, p in m.trained().items()}
        norms = norm_weights(student) if c.norms else {}
        for p in norms.values():
            p.requires_grad_(True)
        job = EndToEnd(c, student, (factors, norms), teacher, texts, self._forward, self.work)
        curve = job.train()
        changed = stored_tensors(self.checkpoint, linears)
        for name, p in norms.items():
            stored = called(name, self.checkpoint, student.base_model_prefix)
            changed[stored] = p.detach().to("cpu", torch.float32).contiguous()
        if curve.best["step"] == 0:
            warn("healing never beat the start on the held-out text: the model is as it was")
        trained = {kind: sum(p.numel() for p in group.values()) for kind, group in (("scales", factors), ("norms", norms))}
        return changed, {"steps": len(curve.losses), "best_step": curve.best["step"], "curve": curve.checks,
                         "losses": curve.losses, "kld": {"before": curve.checks[0]["kld"], "after": curve.best["kld"]},
                         "trained": trained, "scales_moved": moved(linears)}

    def _teacher(self, texts: Texts) -> Teacher:
        """The float model, or its likeliest tokens: then the model is in memory only until it has said them."""
        c = self.config
        shape = (texts.sequences.shape[0], texts.sequences.shape[1])
        if c.teacher_top_k is not None and Cached.complete(self.work):
            return Cached(self.work, shape, c.teacher_top_k, self.device)
        model = load_teacher(self.teacher_folder, self.dtype).to(self.device)
        running = Running(model, texts.sequences, texts.held_out, self._forward)
        if c.teacher_top_k is None:
            return running
        vocab = model.get_output_embeddings().weight.shape[0]
        if c.teacher_top_k > vocab:
            raise UserError(f"--teacher-top-k {c.teacher_top_k}: the model has {vocab} tokens", "give fewer")
        cached = Cached(self.work, shape, c.teacher_top_k, self.device)
        cached.fill(running)
        return cached

    def _blocks(self, texts: Texts) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The same for --scope block."""
        skeleton = Skeleton(Checkpoint.open(self.teacher_folder), str(self.device))
        blocks = Blocks(self.config, self.checkpoint, skeleton, texts, self.work / "blocks", self._forward, self.dtype)
        changed, layers = blocks.run()
        if not any(r["best_step"] for r in layers):
            warn("healing never beat the start on the held-out text: the model is as it was")
        mean = {key: sum(r[key] for r in layers) / len(layers) for key in ("before", "error", "scales_moved")}
        return changed, {"steps": max(r["steps"] for r in layers), "layers": layers,
                         "error": {"before": mean["before"], "after": mean["error"]},
                         "trained": {k: sum(r["trained"][k] for r in layers) for k in ("scales", "norms")},
                         "scales_moved": mean["scales_moved"]}

    def _publish(self, changed: dict[str, torch.Tensor], texts: Texts, result: dict[str, Any]) -> dict[str, Any]:
        """The folder with its healed scales and norms, every other byte as it was."""
        new = self.work / "healed.safetensors"
        save_file(changed, new)
        folder = self.work / "artifact"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        headers = self.checkpoint.headers
        kept = [piece for f in self.checkpoint.files for piece in pieces_of(f, set(headers[f]) - set(changed))]
        write_checkpoint(folder, kept + pieces_of(new))
        for file in self.folder.iterdir():
            if file.is_file() and file.name != MANIFEST and ".safetensors" not in file.name:
                shutil.copyfile(file, folder / file.name)
        entry = {"name": "heal", "config": self.config.numbers(), "threads": self.threads, "device": str(self.device),
                 "precision": str(self.dtype).removeprefix("torch."), "teacher": self.teacher_source,
                 "texts": texts.origins, **result}
        before = read_manifest(self.folder) or {}
        manifest = new_manifest(self.kind, before.get("source") or self.source, [*before.get("passes", []), entry])
        manifest["outputs"] = hash_folder(folder)
        write_json(folder / MANIFEST, manifest)
        publish_folder(folder, self.out)
        shutil.rmtree(self.work)
        return {"out": str(self.out), **{k: v for k, v in result.items() if k not in ("losses", "layers")},
                "texts": [{"name": o["name"], "share": o["share"]} for o in texts.origins],
                "weights_sha256": {k: v for k, v in manifest["outputs"].items() if "safetensors" in k}}


def _check_pair(student: Checkpoint, teacher: Checkpoint) -> None:
    """Student and teacher must be of one shape."""
    for field in ("model_type", "num_hidden_layers", "n_layer", "hidden_size", "n_embd", "vocab_size"):
        ours, theirs = (c.config.get("text_config", c.config).get(field) for c in (student, teacher))
        if ours != theirs:
            raise UserError(f"{student.folder} has {field} {ours} and the teacher {theirs}",
                            "name the model it was quantised from")
