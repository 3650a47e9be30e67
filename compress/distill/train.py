"""The steps of a distillation, in one process or in several processes that share each step (Hugging Face accelerate)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from llmc.compress.distill.config import DistillConfig
from llmc.compress.distill.masks import Masks
from llmc.compress.distill.student import Student, captured
from llmc.compress.teaching.teacher import Teacher
from llmc.compress.teaching.texts import Texts
from llmc.compress.teaching.training import BETAS, Training
from llmc.errors import UserError


def optimizer_of(parameters: Sequence[torch.nn.Parameter], c: DistillConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019, arXiv:1711.05101). Vectors (norms, biases) have no weight decay."""
    groups = [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": c.weight_decay, "share": 1.0},
              {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0, "share": 1.0}]
    # fused makes one pass over the memory instead of seven
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=c.rate, betas=BETAS, fused=device.type in ("cpu", "cuda"))


class Distilling(Training):
    """A step has `accumulate` batches in each process. Its sequences depend only on the total number of batches: two
    processes learn from the same sequences as one process with twice the batches.

    layers: the teacher's layers whose states are compared.  forward: a context in which models run in the right precision.
    """

    what = "distilling"
    by = "loss"

    def __init__(self, config: DistillConfig, student: Student, teacher: Teacher, layers: Sequence[int], texts: Texts,
                 masks: Masks, accelerator: Any, forward: Callable[[], Any], device: torch.device, work: Path) -> None:
        trained = {n: p for n, p in student.named_parameters() if p.requires_grad}
        super().__init__(config, config.rate, trained, optimizer_of(list(trained.values()), config, device), work,
                         accelerator.is_main_process)
        self.c, self.student, self.teacher, self.layers = config, student, teacher, layers
        self.texts, self.masks = texts, masks
        self.accelerator, self.forward, self.device = accelerator, forward, device
        self.shared = accelerator.prepare_model(student, device_placement=False)
        self.hidden: list[float] = []  # errors of the hidden states in the steps since the last check

    def learn(self, step: int) -> float:
        """Returns the mean loss of the batches of a step, and makes their gradients."""
        c, a = self.c, self.accelerator
        sums = torch.zeros(2, device=self.device)
        for i in range(c.accumulate):
            batch = (step * c.accumulate + i) * a.num_processes + a.process_index
            last = i + 1 == c.accumulate
            with nullcontext() if last else a.no_sync(self.shared):
                whole, loss, _, hidden = self._run(self.shared, self.texts.batch(batch, c.batch), self.layers)
                a.backward(whole / c.accumulate)
            sums += torch.stack([loss, hidden]) / c.accumulate
        loss, hidden = a.reduce(sums, "mean").tolist()
        if not math.isfinite(loss + hidden):
            raise UserError(f"the loss is not finite after {step} steps", "use a smaller --lr, or --precision fp32")
        self.hidden.append(hidden)
        return float(loss)

    def update(self) -> None:
        self.masks.mask_gradients()
        self.accelerator.clip_grad_norm_(self.parameters.values(), self.c.clip)
        self.optimizer.step()
        self.masks.apply()

    @torch.no_grad()
    def judge(self) -> dict[str, float]:
        """Returns {'loss', 'perplexity'} over the held-out sequences, and 'hidden', the mean error of the hidden states in
        the steps since the last check."""
        a, held = self.accelerator, self.texts.held_out
        sums = torch.zeros(3)  # loss and nll, weighted by the number of tokens that count, and that number
        for row in range(a.process_index, held, a.num_processes):
            tokens = int((self._targets([row]) >= 0).sum())
            _, loss, nll, _ = self._run(self.student, [row])
            sums += tokens * torch.tensor([float(loss), float(nll), 1])
        loss, nll, tokens = a.reduce(sums.to(self.device), "sum").tolist()
        found = {"loss": loss / tokens, "perplexity": math.exp(min(nll / tokens, 700))}
        if self.layers and self.hidden:
            found["hidden"] = sum(self.hidden) / len(self.hidden)
        self.hidden = []
        return found

    def settled(self) -> None:
        self.accelerator.wait_for_everyone()

    def _run(self, module: Any, rows: list[int], layers: Sequence[int] = ()) -> Any:
        """What `Student.forward` returns for the sequences `rows`."""
        ids = self.texts.sequences[rows]
        with captured(getattr(self.teacher, "model", None), layers) as states:  # a cached teacher has no model and no layers
            soft_targets = self.teacher.of(rows)
        # autograd refuses tensors that were made under inference_mode: hence copies
        with self.forward():
            return module(ids.to(self.device), self._targets(rows).to(self.device), soft_targets, [s.clone() for s in states])

    def _targets(self, rows: list[int]) -> torch.Tensor:
        """int64 [n * seq_len]: the next token of each position; -1 at the end of a sequence and where it does not count."""
        ids, counted = self.texts.sequences[rows], self.texts.counted
        following = ids[:, 1:] if counted is None else torch.where(counted[rows][:, 1:], ids[:, 1:], -1)
        return torch.cat([following, ids.new_full((len(rows), 1), -1)], 1).flatten()
