"""The settings of `llmc heal`: one place for names, defaults and what is allowed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmc.compress.ranges import out_of_range
from llmc.errors import UserError


@dataclass(frozen=True)
class HealConfig:
    """What `llmc heal` and `llmc.heal` take; see `llmc heal --help` for what each means."""

    teacher: str = ""
    calibration: tuple[str, ...] = ("self",)
    steps: int = 160
    batch: int = 2
    seq_len: int = 512
    lr: float = 0.001
    norms: bool = True
    held_out: int = 16
    check_every: int = 20
    patience: int = 3
    checkpointing: bool = False
    seed: int = 0
    device: str = "cpu"
    threads: int | None = None
    out: Path | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        problems = []
        if not self.teacher:
            problems.append("--teacher is missing: the float model that the quantised one was made from")
        problems += out_of_range(self, ("steps", "batch", "held_out", "check_every", "patience"), ("lr",))
        if problems:
            raise UserError("; ".join(problems), "see `llmc heal --help`")

    def numbers(self) -> dict[str, Any]:
        """The settings that decide the result, for manifests and for the fingerprint of `--resume`."""
        deciding = asdict(self)
        for name in ("out", "resume", "device"):
            del deciding[name]
        return deciding
