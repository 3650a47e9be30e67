"""The settings of `llmc distill`: one place for names, defaults and what is allowed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmc.compress.ranges import PRECISIONS, out_of_range
from llmc.errors import UserError

LOSSES = ("forward-kl", "reverse-kl")
AUTO = "auto"
FULL_LR, LORA_LR = 1e-4, 5e-4


@dataclass(frozen=True)
class DistillConfig:
    """What `llmc distill` and `llmc.distill` take; see `llmc distill --help` for what each means."""

    teacher: str = ""
    calibration: tuple[str, ...] = ("self",)
    sampled: int = 16
    steps: int = 200
    batch: int = 2
    accumulate: int = 1
    seq_len: int = 512
    lr: float | None = None
    weight_decay: float = 0.0
    clip: float = 1.0
    loss: str = "forward-kl"
    temperature: float = 1.0
    ce_weight: float = 0.0
    hidden_weight: float = 0.0
    layer_map: str = AUTO
    teacher_top_k: int | None = None
    lora: int | None = None
    held_out: int = 8
    check_every: int = 20
    patience: int = 3
    answers_only: bool = False
    checkpointing: bool = False
    precision: str = "auto"
    seed: int = 0
    device: str = "cpu"
    threads: int | None = None
    out: Path | None = None
    resume: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        problems = []
        if not self.teacher:
            problems.append("--teacher is missing: the model that the student learns from")
        problems += out_of_range(self, ("steps", "batch", "accumulate", "held_out", "check_every", "patience"),
                                 ("lr",) if self.lr is not None else ())
        problems += [f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 0"
                     for name in ("sampled", "weight_decay", "hidden_weight") if getattr(self, name) < 0]
        problems += [f"--{name} {getattr(self, name)}: must be above 0" for name in ("clip", "temperature")
                     if getattr(self, name) <= 0]
        if not 0 <= self.ce_weight <= 1:
            problems.append(f"--ce-weight {self.ce_weight}: must be 0 to 1")
        if self.loss not in LOSSES:
            problems.append(f"--loss {self.loss}: must be {' or '.join(LOSSES)}")
        if self.precision not in PRECISIONS:
            problems.append(f"--precision {self.precision}: must be {', '.join(PRECISIONS)}")
        problems += [f"--{name.replace('_', '-')} {value}: must be at least 1"
                     for name, value in (("teacher_top_k", self.teacher_top_k), ("lora", self.lora))
                     if value is not None and value < 1]
        try:
            self.pairs()
        except ValueError:
            problems.append(f"--layer-map {self.layer_map}: must be auto, or pairs of student's and teacher's layers like "
                            "0:0,8:9,26:29")
        if self.layer_map != AUTO and not self.hidden_weight:
            problems.append("--layer-map goes with --hidden-weight: without it no states are compared")
        if self.hidden_weight and self.teacher_top_k is not None:
            problems.append("--hidden-weight and --teacher-top-k exclude each other: of the teacher only its likeliest "
                            "tokens are kept, not its states")
        if problems:
            raise UserError("; ".join(problems), "see `llmc distill --help`")

    @property
    def rate(self) -> float:
        """The learning rate: given, or what suits full weights or an adapter."""
        return self.lr if self.lr is not None else FULL_LR if self.lora is None else LORA_LR

    def pairs(self) -> list[tuple[int, int]] | None:
        """(student's layer, teacher's layer) that --layer-map names; None for auto."""
        if self.layer_map == AUTO:
            return None
        found = [pair.split(":") for pair in self.layer_map.split(",")]
        return [(int(ours), int(theirs)) for ours, theirs in found]

    def numbers(self) -> dict[str, Any]:
        """The settings that decide the result, for manifests and for the fingerprint of `--resume`."""
        deciding = asdict(self) | {"lr": self.rate}
        for name in ("out", "resume", "device", "dry_run"):
            del deciding[name]
        return deciding
