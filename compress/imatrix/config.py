"""The settings of `llmc imatrix`: one place for names, defaults and what is allowed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmc.compress.ranges import out_of_range
from llmc.errors import UserError


@dataclass(frozen=True)
class ImatrixConfig:
    """What `llmc imatrix` and `llmc.imatrix` take; see `llmc imatrix --help` for what each means."""

    calibration: str = "self"
    samples: int = 128
    seq_len: int = 512
    seed: int = 0
    device: str = "cpu"
    threads: int | None = None
    out: Path | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        if problems := out_of_range(self, ("samples",)):
            raise UserError("; ".join(problems), "see `llmc imatrix --help`")

    def numbers(self) -> dict[str, Any]:
        """The settings that decide the result, for manifests and for the fingerprint of `--resume`."""
        deciding = asdict(self)
        for name in ("out", "resume"):
            del deciding[name]
        return deciding
