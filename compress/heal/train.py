"""Healing end to end: all scales and norms at once, by the divergence of the model's logits from the teacher's."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llmc.artifact import staged_file
from llmc.compress.heal.config import HealConfig
from llmc.compress.heal.loss import distil
from llmc.compress.heal.student import head_of, hidden_states
from llmc.compress.heal.teacher import Teacher
from llmc.compress.heal.texts import Texts
from llmc.console import progress, say

WARM_UP = 0.05  # share of the steps
FLOOR = 0.05  # of the learning rate, at the end of the cosine
NORM_LR = 0.25  # of the learning rate: a norm's weight moves a whole column at once
BETAS = (0.9, 0.95)


def optimizer_of(factors: dict[str, torch.nn.Parameter], norms: dict[str, torch.nn.Parameter], lr: float) -> torch.optim.Adam:
    """Adam, in groups by the share of the learning rate."""
    groups = [{"params": list(factors.values()), "lr": lr, "share": 1.0},
              {"params": list(norms.values()), "lr": lr, "share": NORM_LR}]
    return torch.optim.Adam([g for g in groups if g["params"]], betas=BETAS, eps=1e-10)


def set_rate(optimizer: torch.optim.Optimizer, lr: float, step: int, steps: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["share"] * schedule(step, steps)


def schedule(step: int, steps: int) -> float:
    """Share of the learning rate: linear warm-up, then a cosine down to FLOOR (Loshchilov and Hutter, 2017)."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


@dataclass
class Curve:
    """checks: {'step', 'kld' of the held-out text, 'training' (mean loss since the last)}.  losses: of every step."""

    checks: list[dict[str, Any]]
    losses: list[float]

    @property
    def best(self) -> dict[str, Any]:
        return min(self.checks, key=lambda row: row["kld"])

    def stalled(self, c: HealConfig) -> bool:
        """Whether the last checks, so many as `patience` says, brought nothing. (While the rate is high the loss may rise and
        come back: patience counts in the second half.)"""
        since = self.checks[-1]["step"] - max(self.best["step"], c.steps // 2)
        return bool(since >= c.patience * c.check_every)


class EndToEnd:
    """The steps of one healing. forward: a context in which models run in the right precision; work: where the best scales
    and all that `--resume` needs are kept."""

    def __init__(self, config: HealConfig, student: Any, parameters: tuple[dict[str, Any], dict[str, Any]], teacher: Teacher,
                 texts: Texts, forward: Callable[[], Any], work: Path) -> None:
        self.config, self.student, self.teacher, self.texts = config, student, teacher, texts
        self.forward, self.work = forward, work
        factors, norms = parameters
        self.parameters = {**factors, **{f"norm.{k}": p for k, p in norms.items()}}
        self.optimizer = optimizer_of(factors, norms, config.lr)
        self.device = next(student.parameters()).device
        self.vocab = student.get_output_embeddings().weight.shape[0]

    def train(self) -> Curve:
        """Every step that is not done yet; the best parameters by the held-out text are the student's at the end."""
        c, curve = self.config, self._restore()
        done = len(curve.losses)
        if not curve.checks:
            curve.checks.append({"step": 0, "kld": self._judge(), "training": None})
            self._keep_best()
        with progress("healing, step", c.steps, done) as p:
            for step in range(done, c.steps):
                if curve.stalled(c):
                    say(f"no better for {c.patience} checks: stopped at step {step}")
                    break
                set_rate(self.optimizer, c.lr, step, c.steps)
                self.optimizer.zero_grad(set_to_none=True)
                curve.losses.append(sum(self._learn(step * c.accumulate + i) for i in range(c.accumulate)))
                self.optimizer.step()
                note = f"KLD {curve.losses[-1]:.4f}"
                if (step + 1) % c.check_every == 0 or step + 1 == c.steps:
                    note = self._check(step + 1, curve)
                p.step(note)
        best = load_file(self.work / "best.safetensors")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(best[name])
        return curve

    def _learn(self, batch: int) -> float:
        """The loss of one batch and its gradients, both divided by the batches of a step."""
        rows = self.texts.batch(batch, self.config.batch)
        return self._distil(rows, 1 / self.config.accumulate)

    @torch.no_grad()
    def _judge(self) -> float:
        """Mean KL divergence over the held-out sequences."""
        held = self.texts.held_out
        return sum(self._distil([row]) for row in range(held)) / held

    def _distil(self, rows: list[int], share: float | None = None) -> float:
        """Mean divergence over these sequences, times `share` where given: then with the gradient."""
        aims = self.teacher.of(rows)
        with self.forward():
            states = hidden_states(self.student, self.texts.sequences[rows].to(self.device)).float()
            with head_of(self.student) as head:
                return distil(states, aims, head, self.vocab, share)

    def _check(self, step: int, curve: Curve) -> str:
        """Look at the held-out text after `step` steps. Returns a note for the progress line."""
        kld, recent = self._judge(), curve.losses[curve.checks[-1]["step"]:]
        better = kld < curve.best["kld"]
        curve.checks.append({"step": step, "kld": kld, "training": sum(recent) / len(recent)})
        if better:
            self._keep_best()
        self._save(curve)
        return f"held-out KLD {kld:.4f} (start {curve.checks[0]['kld']:.4f})"

    # ---------------------------------------------------------------------------------------------------- what is kept

    def _keep_best(self) -> None:
        with staged_file(self.work / "best.safetensors") as tmp:
            save_file({k: p.detach().cpu().contiguous() for k, p in self.parameters.items()}, tmp)

    def _save(self, curve: Curve) -> None:
        """Everything that `--resume` needs to go on bit-identically after the last check, in one file."""
        tensors: dict[str, torch.Tensor] = {}
        for name, p in self.parameters.items():
            state = self.optimizer.state[p]
            tensors |= {f"{name}:value": p.detach(), f"{name}:first": state["exp_avg"], f"{name}:second": state["exp_avg_sq"]}
        metadata = {"checks": json.dumps(curve.checks), "losses": json.dumps(curve.losses)}
        with staged_file(self.work / "state.safetensors") as tmp:
            save_file({k: t.cpu().contiguous() for k, t in tensors.items()}, tmp, metadata=metadata)

    @torch.no_grad()
    def _restore(self) -> Curve:
        path = self.work / "state.safetensors"
        if not path.is_file():
            return Curve([], [])
        with safe_open(path, framework="pt") as f:
            curve = Curve(json.loads(f.metadata()["checks"]), json.loads(f.metadata()["losses"]))
            for name, p in self.parameters.items():
                p.copy_(f.get_tensor(f"{name}:value"))
                self.optimizer.state[p] = {"step": torch.tensor(float(len(curve.losses))),
                                           "exp_avg": f.get_tensor(f"{name}:first").to(self.device),
                                           "exp_avg_sq": f.get_tensor(f"{name}:second").to(self.device)}
        say(f"resuming after step {len(curve.losses)}")
        return curve
