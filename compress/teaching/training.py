"""A training: learning rate schedule, checks on the held-out text, early stopping, and the state for `--resume`."""

from __future__ import annotations

import json
import math
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from llmc.compress.state_file import load_state, save_state
from llmc.console import progress, say

WARM_UP = 0.05  # share of the steps
FLOOR = 0.05  # share of the learning rate at the end of the cosine
BETAS = (0.9, 0.95)


class Steps(Protocol):
    """The options that a training reads."""

    @property
    def steps(self) -> int: ...
    @property
    def check_every(self) -> int: ...
    @property
    def patience(self) -> int: ...


def set_rate(optimizer: torch.optim.Optimizer, lr: float, step: int, steps: int) -> None:
    """Set the learning rate of each group for this step: lr * the group's share * the schedule."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["share"] * schedule(step, steps)


def schedule(step: int, steps: int) -> float:
    """Share of the learning rate at `step`: linear warm-up, then a cosine down to FLOOR (Loshchilov and Hutter, 2017)."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


@dataclass
class Curve:
    """checks: {'step', the metrics on the held-out text, 'training' (mean loss since the last check)} of each check.  losses:
    of every step.  by: the metric that chooses the best check."""

    checks: list[dict[str, Any]]
    losses: list[float]
    by: str = "kld"

    @property
    def best(self) -> dict[str, Any]:
        return min(self.checks, key=lambda row: row[self.by])

    def stalled(self, c: Steps) -> bool:
        """Whether the last `patience` checks brought no improvement. Only checks in the second half of the steps count,
        because the loss may rise for a time while the learning rate is high."""
        since = self.checks[-1]["step"] - max(self.best["step"], c.steps // 2)
        return bool(since >= c.patience * c.check_every)


class Training(ABC):
    """parameters: the trained parameters, by name.  lr: learning rate of groups whose share is 1.  work: the folder for the
    best parameters and the state for `--resume`.  writes: whether this process writes there (one of several processes
    does)."""

    what = "training"
    by = "kld"

    def __init__(self, config: Steps, lr: float, parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer,
                 work: Path, writes: bool = True) -> None:
        self.config, self.lr, self.parameters, self.optimizer = config, lr, parameters, optimizer
        self.work, self.writes = work, writes

    @abstractmethod
    def learn(self, step: int) -> float:
        """Make the gradients of a step. Returns the loss of the step."""

    @abstractmethod
    def judge(self) -> dict[str, float]:
        """The metrics on the held-out text: the metric `by`, and others."""

    def update(self) -> None:
        """Move the parameters along their gradients."""
        self.optimizer.step()

    def rate(self, start: dict[str, float]) -> float:
        """The learning rate. start: the metrics on the held-out text before the first step."""
        return self.lr

    def settled(self) -> None:  # noqa: B027 - most trainings have nothing to do here
        """Called after files were written: wait until all processes can read them."""

    def train(self) -> Curve:
        """Run every step that is not done yet. At the end the parameters are those that are best on the held-out text."""
        c, curve = self.config, self._restore()
        done = len(curve.losses)
        if not curve.checks:
            curve.checks.append({"step": 0, **self.judge(), "training": None})
            self._keep_best()
        lr = self.rate(curve.checks[0])
        with progress(f"{self.what}, step", c.steps, done) as p:
            for step in range(done, c.steps):
                if curve.stalled(c):
                    say(f"no improvement in {c.patience} checks: stopped at step {step}")
                    break
                set_rate(self.optimizer, lr, step, c.steps)
                self.optimizer.zero_grad(set_to_none=True)
                curve.losses.append(self.learn(step))
                self.update()
                note = f"loss {curve.losses[-1]:.4f}"
                if (step + 1) % c.check_every == 0 or step + 1 == c.steps:
                    note = self._check(step + 1, curve)
                p.step(note)
        self.settled()
        best, _ = load_state(self.work / "best.safetensors")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(best[name])
        return curve

    def _check(self, step: int, curve: Curve) -> str:
        """Measure on the held-out text after `step` steps. Returns a note for the progress line."""
        found, recent = self.judge(), curve.losses[curve.checks[-1]["step"]:]
        better = found[self.by] < curve.best[self.by]
        curve.checks.append({"step": step, **found, "training": sum(recent) / len(recent)})
        if better:
            self._keep_best()
        self._save(curve)
        return f"held-out {self.by} {found[self.by]:.4f} (start {curve.checks[0][self.by]:.4f})"

    # ---------------------------------------------------------------------------------------------------- stored state

    def _keep_best(self) -> None:
        if self.writes:
            save_state(self.work / "best.safetensors", dict(self.parameters))

    def _save(self, curve: Curve) -> None:
        """Write one file with everything that `--resume` needs to continue bit for bit after the last check."""
        if not self.writes:
            return
        tensors: dict[str, torch.Tensor] = {}
        for name, p in self.parameters.items():
            tensors[f"{name}:value"] = p.detach()
            tensors |= {f"{name}:{key}": t for key, t in self.optimizer.state[p].items()}
        metadata = {"checks": json.dumps(curve.checks), "losses": json.dumps(curve.losses)}
        save_state(self.work / "state.safetensors", tensors, metadata)

    @torch.no_grad()
    def _restore(self) -> Curve:
        path = self.work / "state.safetensors"
        if not os.path.lexists(path):
            return Curve([], [], self.by)
        tensors, metadata = load_state(path)
        curve = Curve(json.loads(metadata["checks"]), json.loads(metadata["losses"]), self.by)
        stored: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, field = key.rpartition(":")
            stored.setdefault(name, {})[field] = tensor
        for name, p in self.parameters.items():
            fields = stored[name]
            p.copy_(fields.pop("value"))
            self.optimizer.state[p] = {field: self._placed(field, value, p) for field, value in fields.items()}
        say(f"resuming after step {len(curve.losses)}")
        return curve

    def _placed(self, field: str, value: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        """The value on the device that the optimizer needs: the step count stays on the CPU unless the optimizer is fused."""
        fused = any(group.get("fused") for group in self.optimizer.param_groups)
        return value if field == "step" and not fused else value.to(p.device)
