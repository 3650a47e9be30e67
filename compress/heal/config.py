"""The settings of `llmc heal`: one place for names, defaults and what is allowed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmc.compress.ranges import PRECISIONS, out_of_range
from llmc.errors import UserError

SCOPES = ("end-to-end", "block")


@dataclass(frozen=True)
class HealConfig:
    """What `llmc heal` and `llmc.heal` take; see `llmc heal --help` for what each means."""

    teacher: str = ""
    calibration: tuple[str, ...] = ("self",)
    sampled: int = 16
    scope: str = "end-to-end"
    steps: int = 160
    batch: int = 2
    accumulate: int = 1
    seq_len: int = 512
    lr: float | None = None
    """None: end to end by the divergence at the start (train.py); of a block MOST_LR."""
    norms: bool = True
    teacher_top_k: int | None = None
    held_out: int = 8
    check_every: int = 20
    patience: int = 3
    checkpointing: bool = False
    precision: str = "auto"
    seed: int = 0
    device: str = "cpu"
    threads: int | None = None
    out: Path | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        problems = []
        if not self.teacher:
            problems.append("--teacher is missing: the float model that the quantized one was made from")
        problems += out_of_range(self, ("steps", "batch", "accumulate", "held_out", "check_every", "patience"),
                                 ("lr",) if self.lr is not None else ())
        if self.sampled < 0:
            problems.append(f"--sampled {self.sampled}: must be at least 0")
        if self.scope not in SCOPES:
            problems.append(f"--scope {self.scope}: must be {' or '.join(SCOPES)}")
        if self.precision not in PRECISIONS:
            problems.append(f"--precision {self.precision}: must be {', '.join(PRECISIONS)}")
        if self.teacher_top_k is not None and self.teacher_top_k < 1:
            problems.append(f"--teacher-top-k {self.teacher_top_k}: must be at least 1")
        if self.scope == "block" and (self.teacher_top_k is not None or self.checkpointing):
            problems.append("--teacher-top-k and --checkpointing go with --scope end-to-end: a block learns from the "
                            "teacher's layer and is small")
        if problems:
            raise UserError("; ".join(problems), "see `llmc heal --help`")

    def numbers(self) -> dict[str, Any]:
        """The settings that decide the result, for manifests and for the fingerprint of `--resume`."""
        deciding = asdict(self)
        for name in ("out", "resume", "device"):
            del deciding[name]
        return deciding
