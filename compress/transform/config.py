"""The settings of `llmc transform`: one place for names, defaults and what is allowed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmc.compress.quantize.config import QuantizeConfig
from llmc.compress.ranges import out_of_range
from llmc.errors import UserError

SCALINGS = ("awq", "equalize", "smoothquant", "none")
ROTATIONS = ("none", "r2", "r1r2")
TARGET = ("bits", "type", "fallback", "group_size", "sym")  # these mean what they mean to `llmc quantize`
CALIBRATED = ("calibration", "samples", "seq_len")


@dataclass(frozen=True)
class TransformConfig:
    """What `llmc transform` and `llmc.transform` take; see `llmc transform --help` for what each means."""

    scaling: str = "awq"
    rotate: str = "none"
    untie: bool = False
    bits: int = 4
    type: str | None = None
    fallback: str | None = None
    group_size: int = 32
    sym: bool = True
    calibration: str = "self"
    samples: int = 128
    seq_len: int = 512
    seed: int = 0
    device: str = "cpu"
    threads: int | None = None
    out: Path | None = None
    resume: bool = False
    alpha: float = 0.5
    """Of --scaling smoothquant: how much of the activations' range moves into the weights, 0 to 1."""

    @property
    def calibrated(self) -> bool:
        """Whether text is run through the model."""
        return self.scaling in ("awq", "smoothquant")

    def __post_init__(self) -> None:
        problems = []
        if self.scaling not in SCALINGS:
            problems.append(f"--scaling {self.scaling}: must be {', '.join(SCALINGS)}")
        if self.rotate not in ROTATIONS:
            problems.append(f"--rotate {self.rotate}: must be {', '.join(ROTATIONS)}")
        if self.scaling == self.rotate == "none":
            problems.append("--scaling none --rotate none: there is nothing to do")
        if self.untie and self.rotate != "r1r2":
            problems.append(f"--untie goes with --rotate r1r2, not {self.rotate}")
        problems += out_of_range(self, ("samples",))
        if not 0 <= self.alpha <= 1:
            problems.append(f"--alpha {self.alpha}: must be 0 to 1")
        if problems:
            raise UserError("; ".join(problems), "see `llmc transform --help`")
        self.target()

    def target(self) -> QuantizeConfig:
        """The quantization that channel scalings are searched for. Checks the options that it shares."""
        return QuantizeConfig(**{name: getattr(self, name) for name in TARGET})

    def numbers(self) -> dict[str, Any]:
        """The settings that decide the result, for manifests and for the fingerprint of `--resume`."""
        return {k: v for k, v in asdict(self).items() if k not in ("out", "resume", "device", "threads")}

    def numbers_of(self, stage: str) -> dict[str, Any]:
        """Those that decide one stage, 'rotate' or 'scaling'."""
        if stage == "rotate":
            names: tuple[str, ...] = ("rotate", "untie", "seed")
        else:
            searched = ("alpha",) if self.scaling == "smoothquant" else TARGET
            names = ("scaling", *searched, *(CALIBRATED if self.calibrated else ()))
        return {name: getattr(self, name) for name in names}
