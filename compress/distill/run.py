"""`llmc distill`: train a smaller float model, for example a pruned one, to predict as a larger one does.

The objective is the KL divergence of the student's next-token distributions from the teacher's (loss.py). The options can add
the cross-entropy on the text's own next tokens and the error of hidden states (student.py). The result has the weights that
are best on a held-out part of the text, not the last ones. The reported losses are measured after the weights were rounded to
the type that the folder stores.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from llmc.compress.distill.adapters import add_adapters, check_peft, merge_adapters
from llmc.compress.distill.config import DistillConfig
from llmc.compress.distill.masks import Masks, masks_of
from llmc.compress.distill.plan import plan_of
from llmc.compress.distill.student import Student, map_layers
from llmc.compress.distill.team import join_team
from llmc.compress.distill.train import Distilling
from llmc.compress.preparation import check_weights, open_float
from llmc.compress.skeleton import Skeleton
from llmc.compress.teaching.job import Job
from llmc.compress.teaching.loss import Objective
from llmc.compress.teaching.models import checkpoint_layers
from llmc.compress.teaching.training import Curve
from llmc.compress.teaching.vocabulary import common_vocabulary
from llmc.compress.zeros import mask_of
from llmc.console import warn
from llmc.errors import UserError
from llmc.files import check_disk
from llmc.formats.hf import load_torch_model
from llmc.formats.manifest import check_output, note_last
from llmc.formats.source import model_name
from llmc.locks import locked
from llmc.machine import physical_cores
from llmc.precision import prepare_cpu
from llmc.sources.resolve import resolve_model


def distill(student: str | Path, config: DistillConfig) -> dict[str, Any]:
    """Train `student` and write it as a folder. The shapes of its tensors do not change.

    Returns {'out', 'steps', 'best_step', 'loss': {'before', 'after'}, 'perplexity': {'before', 'after'}, 'curve', 'seconds',
    …}; with `dry_run` the plan and its estimates. If several processes train (`accelerate launch`), only the first one writes
    the folder and returns the result; the others return {}.
    """
    start = time.monotonic()
    threads = config.threads or physical_cores()
    if config.lora is not None:
        check_peft()
    if not config.dry_run:
        check_output(config.out, "hf", student, config)
    job = _Job(resolve_model(student), resolve_model(config.teacher), config, threads)
    prepare_cpu(threads)  # after _Job, because accelerate sets the number of threads too
    plan = plan_of(job.student, job.taught, config, job.dtype, job.device, threads)
    if config.dry_run:
        return {"source": str(job.folder), "out": str(job.out), **plan}
    check_output(job.out, "hf", job.folder, config)
    check_disk(job.out, plan["disk_bytes"], "distilling")
    with locked(job.out) if job.leads else nullcontext():
        result = job.run()
    if not job.leads:
        return {}
    note_last(job.out, "hf")
    return {**result, "seconds": round(time.monotonic() - start, 1)}


class _Job(Job):
    """One distillation: the checks before it starts, and its steps. student, taught: the student and the teacher, both
    without weights."""

    name = "distill"

    def __init__(self, folder: Path, teacher: Path, config: DistillConfig, threads: int) -> None:
        self.accelerator, device = join_team(config.device)
        self.processes = self.accelerator.num_processes
        super().__init__(folder, teacher, config, threads, config.out or Path(f"{model_name(folder)}-distilled"), device)
        self.config, self.answers_only = config, config.answers_only
        self.student, self.taught = (Skeleton(open_float(f), "cpu") for f in (folder, teacher))
        self.vocab = common_vocabulary(self.student, self.taught)
        _check_positions(config, self.student, self.taught)
        depths = len(self.student.layers), len(self.taught.layers)
        self.layers = map_layers(config.pairs(), *depths) if config.hidden_weight else []
        self.sparse = mask_of(folder) is not None
        if self.sparse and config.lora is not None:
            raise UserError(f"{folder} was pruned to a mask, and an adapter would fill its zeros",
                            "leave out --lora: training full weights keeps the zeros")
        self.objective = Objective(config.loss == "reverse-kl", config.temperature, config.ce_weight)

    @property
    def leads(self) -> bool:
        return bool(self.accelerator.is_main_process)

    def leader_first(self) -> AbstractContextManager[Any]:
        found: AbstractContextManager[Any] = self.accelerator.main_process_first()
        return found

    def run(self) -> dict[str, Any]:
        for checkpoint in (self.checkpoint, self.taught.checkpoint):
            check_weights(checkpoint)
        self.open_work()
        texts = self.texts()
        # before the student is loaded: with --teacher-top-k the teacher has left the memory by then
        teacher = self.teacher(texts, self.vocab, self.config.temperature)
        student, masks = self._student()
        training = Distilling(self.config, student, teacher, [b for _, b in self.layers], texts, masks, self.accelerator,
                              self.forward, self.device, self.work)
        trained = sum(p.numel() for n, p in training.parameters.items() if not n.startswith("projections."))
        curve = training.train()
        changed = self._settle(student.model)
        after = training.judge()
        if curve.best["step"] == 0:
            warn("distillation did not improve the model on the held-out text: the weights did not change")
        return self.publish("hf", changed, texts, self._result(curve, after, trained, masks)) if self.leads else {}

    def _student(self) -> tuple[Student, Masks]:
        """The student in float32, with adapters if --lora asks for them, and the masks of its zeros."""
        c = self.config
        model = load_torch_model(self.folder)
        masks = masks_of(model) if self.sparse else Masks({})
        if c.lora is not None:
            add_adapters(model, c.lora, c.seed)
        if c.checkpointing:
            checkpoint_layers(model)
        widths = tuple(s.config.get_text_config().hidden_size for s in (self.student, self.taught))
        student = Student(model, self.objective, self.vocab, [a for a, _ in self.layers], c.hidden_weight, widths, c.seed)
        return student.to(self.device), masks

    @torch.no_grad()
    def _settle(self, model: Any) -> dict[str, torch.Tensor]:
        """Merge the adapters and round the weights to their stored types. Returns the tensors that changed, by their names in
        the checkpoint."""
        if self.config.lora is not None:
            merge_adapters(model)
        changed = {}
        for name, p in model.named_parameters(remove_duplicate=False):
            stored = self.student.names.find(name)
            if stored is None:  # the second name of a tied matrix
                continue
            before = self.checkpoint.tensor(stored)
            after = p.detach().to("cpu", before.dtype).contiguous()
            p.copy_(after)
            if not torch.equal(before, after):
                changed[stored] = after
        return changed

    def _result(self, curve: Curve, after: dict[str, float], trained: int, masks: Masks) -> dict[str, Any]:
        first = curve.checks[0]
        return {"steps": len(curve.losses), "best_step": curve.best["step"], "curve": curve.checks, "losses": curve.losses,
                **{key: {"before": first[key], "after": after[key]} for key in ("loss", "perplexity")},
                "trained": trained, "vocabulary": self.vocab, "layer_map": [list(pair) for pair in self.layers],
                "processes": self.processes, "zeros_kept": masks.zeros}


def _check_positions(c: DistillConfig, *models: Skeleton) -> None:
    for model in models:
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or c.seq_len
        if c.seq_len > limit:
            raise UserError(f"--seq-len {c.seq_len}: {model.checkpoint.folder} has positions for {limit} tokens",
                            f"use --seq-len {limit} or less")
