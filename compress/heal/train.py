"""End-to-end healing: train all scales and norms together on the KL divergence of the model's logits from the teacher's."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llmc.compress.heal.config import HealConfig
from llmc.compress.teaching.loss import distillation_loss
from llmc.compress.teaching.models import head_of, hidden_states
from llmc.compress.teaching.teacher import Teacher
from llmc.compress.teaching.texts import Texts
from llmc.compress.teaching.training import BETAS, Training

MOST_LR = 0.001
# Held-out KLD of a 135 M model in q4_k, 0.0474 at the start: 0.0453 after 30 steps at 0.0003, the rate that this constant
# gives; 0.0487 after 20 steps at 0.001.
LR_BY_ROOT_KLD = 0.0015
NORM_LR = 0.25  # share of the learning rate: a norm's weight scales a whole column


def optimizer_of(factors: dict[str, torch.nn.Parameter], norms: dict[str, torch.nn.Parameter]) -> torch.optim.Adam:
    """Adam with one group for factors and one for norms. `share` is a group's share of the learning rate; set_rate sets the
    rate at every step."""
    groups = [{"params": list(factors.values()), "share": 1.0}, {"params": list(norms.values()), "share": NORM_LR}]
    return torch.optim.Adam([g for g in groups if g["params"]], betas=BETAS, eps=1e-10)


class EndToEnd(Training):
    """The steps of one healing. vocab: number of logits that are compared (the first ones).  forward: a context in which
    models run in the right precision."""

    what = "healing"

    def __init__(self, config: HealConfig, student: Any, parameters: tuple[dict[str, Any], dict[str, Any]], teacher: Teacher,
                 texts: Texts, vocab: int, forward: Callable[[], Any], work: Path) -> None:
        factors, norms = parameters
        super().__init__(config, MOST_LR, {**factors, **{f"norm.{k}": p for k, p in norms.items()}},
                         optimizer_of(factors, norms), work)
        self.given = config.lr
        self.batch, self.accumulate = config.batch, config.accumulate
        self.student, self.teacher, self.texts, self.forward = student, teacher, texts, forward
        self.device = next(student.parameters()).device
        self.vocab = vocab

    def rate(self, start: dict[str, float]) -> float:
        """--lr if given, else a rate proportional to the square root of the KL divergence at the start, at most MOST_LR.

        The distance of the scales from their optimum grows with this square root. The size of Adam's steps depends on the
        learning rate and not on the gradient, and too large steps damage a good 4-bit model."""
        kld = max(0.0, start["kld"])  # float error can make the divergence slightly negative
        return self.given or min(self.lr, LR_BY_ROOT_KLD * math.sqrt(kld))

    def learn(self, step: int) -> float:
        """Returns the mean loss of the batches of a step, and makes their gradients."""
        batches = range(step * self.accumulate, (step + 1) * self.accumulate)
        return sum(self._loss(self.texts.batch(i, self.batch), 1 / self.accumulate) for i in batches)

    @torch.no_grad()
    def judge(self) -> dict[str, float]:
        """Mean KL divergence over the held-out sequences."""
        held = self.texts.held_out
        return {"kld": sum(self._loss([row]) for row in range(held)) / held}

    def _loss(self, rows: list[int], share: float | None = None) -> float:
        """The mean KL divergence over the sequences `rows`. With `share` it is multiplied by it, and gradients are made."""
        soft_targets = self.teacher.of(rows)
        with self.forward():
            states = hidden_states(self.student, self.texts.sequences[rows].to(self.device)).float()
            with head_of(self.student) as head:
                loss, _ = distillation_loss(states, soft_targets, head, self.vocab)
        if share is None:
            return float(loss)
        (loss * share).backward()
        return float(loss.detach()) * share
