"""Healing end to end: all scales and norms at once, by the divergence of the model's logits from the teacher's."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llmc.compress.heal.config import HealConfig
from llmc.compress.teaching.loss import distil
from llmc.compress.teaching.models import head_of, hidden_states
from llmc.compress.teaching.teacher import Teacher
from llmc.compress.teaching.texts import Texts
from llmc.compress.teaching.training import BETAS, Training

MOST_LR = 0.001
# Held-out KLD of q4_k, 135 M, from 0.0474: 0.0453 after 30 steps at 0.0003, which this gives; 0.0487 after 20 at 0.001.
LR_BY_ROOT_KLD = 0.0015
NORM_LR = 0.25  # of the learning rate: a norm's weight moves a whole column at once


def optimizer_of(factors: dict[str, torch.nn.Parameter], norms: dict[str, torch.nn.Parameter]) -> torch.optim.Adam:
    """Adam, in groups by the share of the learning rate, which is set at every step."""
    groups = [{"params": list(factors.values()), "share": 1.0}, {"params": list(norms.values()), "share": NORM_LR}]
    return torch.optim.Adam([g for g in groups if g["params"]], betas=BETAS, eps=1e-10)


class EndToEnd(Training):
    """The steps of one healing. vocab: how many of the logits count.  forward: a context in which models run in the
    right precision."""

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
        """How far scales are from where they should be grows with the square root of the divergence, and so do Adam's steps,
        whose size no gradient decides: too large ones lose more on a 4-bit model than there is to win."""
        kld = max(0.0, start["kld"])  # rounding can leave a model that lost nothing just below zero
        return self.given or min(self.lr, LR_BY_ROOT_KLD * math.sqrt(kld))

    def learn(self, step: int) -> float:
        """The losses of the batches of a step, each divided by their number, and their gradients."""
        batches = range(step * self.accumulate, (step + 1) * self.accumulate)
        return sum(self._distil(self.texts.batch(i, self.batch), 1 / self.accumulate) for i in batches)

    @torch.no_grad()
    def judge(self) -> dict[str, float]:
        """Mean KL divergence over the held-out sequences."""
        held = self.texts.held_out
        return {"kld": sum(self._distil([row]) for row in range(held)) / held}

    def _distil(self, rows: list[int], share: float | None = None) -> float:
        """Mean divergence over these sequences, times `share` where given: then with the gradient."""
        aims = self.teacher.of(rows)
        with self.forward():
            states = hidden_states(self.student, self.texts.sequences[rows].to(self.device)).float()
            with head_of(self.student) as head:
                loss, _ = distil(states, aims, head, self.vocab)
        if share is None:
            return float(loss)
        (loss * share).backward()
        return float(loss.detach()) * share
