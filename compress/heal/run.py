"""`llmc heal`: train the scales of a quantized model against the model that was quantized, or against a larger one.

The codes do not change by a bit and the scales are fp16 as before, so size, format and speed do not change. End-to-end
healing minimizes the forward KL divergence from teacher to student over every position (Hinton et al., "Distilling the
Knowledge in a Neural Network", 2015, arXiv:1503.02531, at temperature 1). blocks.py describes the loss of --scope block. The
result has the scales that are best on a held-out part of the text, not the last ones. If training improves nothing, the model
does not change and a warning reports it.

Embedding and head are not trained: a quantized folder holds them in float, and the export quantizes them.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from llmc.compress.coverage import left_float
from llmc.compress.heal.blocks import Blocks
from llmc.compress.heal.config import HealConfig
from llmc.compress.heal.student import load_student, moved, norm_weights, stored_tensors
from llmc.compress.heal.train import EndToEnd
from llmc.compress.skeleton import Skeleton
from llmc.compress.teaching.job import Job
from llmc.compress.teaching.texts import Texts
from llmc.compress.teaching.vocabulary import common_vocabulary
from llmc.console import warn
from llmc.errors import UserError
from llmc.files import check_disk
from llmc.formats import quantized
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.manifest import check_output, note_last
from llmc.formats.names import Names
from llmc.locks import locked
from llmc.machine import physical_cores, torch_device
from llmc.precision import prepare_cpu
from llmc.sources.resolve import resolve_model


def heal(model: str | Path, config: HealConfig) -> dict[str, Any]:
    """Heal the quantized folder `model`.

    Returns {'out', 'steps', 'best_step', 'kld': {'before', 'after'}, 'seconds', …}; with scope 'block' it has 'error' (of the
    layers' outputs) instead of 'kld'."""
    start = time.monotonic()
    threads = config.threads or physical_cores()
    prepare_cpu(threads)
    check_output(config.out, "gptq", model, config)
    job = _Job(resolve_model(model), resolve_model(config.teacher), config, threads)
    with locked(job.out):
        result = job.run()
    note_last(job.out, job.kind)
    return {**result, "seconds": round(time.monotonic() - start, 1)}


class _Job(Job):
    """One healing: the checks before it starts, and its steps. taught: the teacher, without weights."""

    name = "heal"

    def __init__(self, folder: Path, teacher: Path, config: HealConfig, threads: int) -> None:
        out = config.out or folder.with_name(f"{folder.resolve().name}-healed")
        super().__init__(folder, teacher, config, threads, out, torch_device(config.device))
        self.config = config
        if not quantized.linears(self.checkpoint):
            raise UserError(f"{folder} is a float model: there is nothing to heal", "run `llmc quantize` on it first")
        taught = Checkpoint.open(teacher)
        if taught.quantization is not None:
            raise UserError(f"the teacher {teacher} is quantized itself", "give a float model as --teacher")
        if config.scope == "block":
            _check_layers(self.checkpoint, taught)
        self.taught = Skeleton(taught, str(self.device))
        student = Skeleton(self.checkpoint, "cpu")
        self.vocab = common_vocabulary(student, self.taught)
        self.left = left_float(student, "healed")
        check_output(self.out, "gptq", folder, config)
        self.kind = "gptq" if (self.checkpoint.quantization or {}).get("quant_method") == "gptq" else "blocks"
        check_disk(self.out, self._disk_bytes(), "healing")

    def _disk_bytes(self) -> int:
        """Bytes for the folder, the changed tensors and the state of a resumed run, and for the teacher's most likely tokens
        or (--scope block) the hidden states of both models."""
        c, text = self.config, self.checkpoint.config
        tokens = (c.steps * c.batch * c.accumulate + c.held_out) * c.seq_len
        if c.scope == "block":
            more = 2 * 3 * 4 * tokens * int(text.get("hidden_size") or text.get("n_embd") or 0)
        else:
            more = tokens * (8 * c.teacher_top_k + 4) if c.teacher_top_k else 0
        return 3 * sum(p.stat().st_size for p in self.checkpoint.files) + more

    def run(self) -> dict[str, Any]:
        self.open_work()
        texts = self.texts()
        changed, result = self._blocks(texts) if self.config.scope == "block" else self._end_to_end(texts)
        return self.publish(self.kind, changed, texts, {**result, "floats": self.left})

    def _end_to_end(self, texts: Texts) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Returns (the changed tensors by their names in the folder, the result to report)."""
        c = self.config
        # before the student is loaded: with --teacher-top-k the teacher has left the memory by then
        teacher = self.teacher(texts, self.vocab)
        student, linears = load_student(self.folder, self.dtype, c.checkpointing)
        student.to(self.device)
        factors = {f"{name}.{kind}": p for name, m in linears.items() for kind, p in m.trained().items()}
        norms = norm_weights(student) if c.norms else {}
        for p in norms.values():
            p.requires_grad_(True)
        job = EndToEnd(c, student, (factors, norms), teacher, texts, self.vocab, self.forward, self.work)
        curve = job.train()
        changed = stored_tensors(self.checkpoint, linears)
        names = Names.of(self.checkpoint, student)
        for name, p in norms.items():
            changed[names.stored(name)] = p.detach().to("cpu", torch.float32).contiguous()
        if curve.best["step"] == 0:
            warn("healing did not improve the model on the held-out text: the weights did not change")
        trained = {kind: sum(p.numel() for p in group.values()) for kind, group in (("scales", factors), ("norms", norms))}
        return changed, {"steps": len(curve.losses), "best_step": curve.best["step"], "curve": curve.checks,
                         "lr": job.rate(curve.checks[0]), "losses": curve.losses,
                         "kld": {"before": curve.checks[0]["kld"], "after": curve.best["kld"]},
                         "trained": trained, "scales_moved": moved(linears)}

    def _blocks(self, texts: Texts) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Returns what `_end_to_end` returns, for --scope block."""
        blocks = Blocks(self.config, self.checkpoint, self.taught, texts, self.work / "blocks", self.forward, self.dtype)
        changed, layers = blocks.run()
        if not any(r["best_step"] for r in layers):
            warn("healing did not improve the model on the held-out text: the weights did not change")
        mean = {key: sum(r[key] for r in layers) / len(layers) for key in ("before", "error", "scales_moved")}
        return changed, {"steps": max(r["steps"] for r in layers), "layers": layers,
                         "error": {"before": mean["before"], "after": mean["error"]},
                         "trained": {k: sum(r["trained"][k] for r in layers) for k in ("scales", "norms")},
                         "scales_moved": mean["scales_moved"]}


def _check_layers(student: Checkpoint, teacher: Checkpoint) -> None:
    """UserError if student and teacher differ in shape: --scope block compares layer by layer."""
    for field in ("model_type", "num_hidden_layers", "n_layer", "hidden_size", "n_embd"):
        of_student, of_teacher = (c.config.get("text_config", c.config).get(field) for c in (student, teacher))
        if of_student != of_teacher:
            raise UserError(f"{student.folder} has {field} {of_student} and the teacher {of_teacher}",
                            "give the model that was quantized as --teacher; --scope end-to-end takes any model with the "
                            "same tokenizer")
