"""The options of `llmc transform`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmc import options
from llmc.compress import shared_options as shared
from llmc.compress.quantize.config import BITS, DEFAULT_BITS, QuantizeConfig
from llmc.options import ADVANCED, check, like, option

SCALINGS = ("awq", "equalize", "smoothquant", "none")
ROTATIONS = ("none", "r2", "r1r2")
TARGET = ("bits", "type", "fallback", "group_size", "sym")  # the same options as in `llmc quantize`
CALIBRATED = ("calibration", "samples", "seq_len")


@dataclass(frozen=True, kw_only=True)
class TransformConfig:
    """The options of `llmc transform` and `llmc.transform`."""

    scaling: str = option(
        "awq", help="Method that scales channels. awq searches scales on calibration text. equalize needs no text. smooth is "
                    "SmoothQuant, for 8-bit activations.", choices=SCALINGS)
    rotate: str = option(
        "none", help="Channels to rotate. r2 rotates the values of each head. r1r2 rotates the residual stream too.",
        choices=ROTATIONS)
    untie: bool = option(
        False, help="Give a tied head its own matrix, for --rotate r1r2. The model grows by this matrix.", group=ADVANCED)
    bits: int = option(DEFAULT_BITS, help="Number of bits of a weight's code that scales are searched for.", choices=BITS)
    type: str | None = like(
        QuantizeConfig, "type", help="GGUF weight type that scales are searched for, instead of --bits.")
    fallback: str | None = like(QuantizeConfig, "fallback")
    group_size: int = like(QuantizeConfig, "group_size")
    sym: bool = like(QuantizeConfig, "sym", help="Search for a fixed zero point (--sym) or a stored one (--asym).")
    calibration: str = shared.calibration()
    samples: int = shared.samples()
    seq_len: int = shared.seq_len()
    seed: int = shared.seed("Seed of rotations and of --calibration self.")
    device: str = shared.device()
    threads: int | None = options.threads()
    out: Path | None = options.out("Folder to write.", "MODEL-ROTATION-SCALING")
    resume: bool = shared.resume()
    alpha: float = option(
        0.5, help="Share of the activations' range that --scaling smoothquant moves into the weights.", low=0, high=1,
        group=ADVANCED)
    dry_run: bool = options.dry_run()

    @property
    def calibrated(self) -> bool:
        """Whether calibration text is needed."""
        return self.scaling in ("awq", "smoothquant")

    def __post_init__(self) -> None:
        problems = []
        if self.scaling == self.rotate == "none":
            problems.append("--scaling none --rotate none: there is nothing to do, give one of them")
        if self.untie and self.rotate != "r1r2":
            problems.append(f"--untie goes with --rotate r1r2, not {self.rotate}")
        check(self, "transform", problems)
        self.target()

    def target(self) -> QuantizeConfig:
        """The quantization that channel scalings are searched for. UserError if these options contradict each other."""
        return QuantizeConfig(**{name: getattr(self, name) for name in TARGET})

    def numbers(self) -> dict[str, Any]:
        """The options that affect the result, for manifests and for the fingerprint of `--resume`."""
        return {k: v for k, v in asdict(self).items() if k not in ("out", "resume", "device", "threads", "dry_run")}

    def numbers_of(self, stage: str) -> dict[str, Any]:
        """The options that affect the result of one stage, 'rotate' or 'scaling'."""
        if stage == "rotate":
            names: tuple[str, ...] = ("rotate", "untie", "seed")
        else:
            searched = ("alpha",) if self.scaling == "smoothquant" else TARGET
            names = ("scaling", *searched, *(CALIBRATED if self.calibrated else ()))
        return {name: getattr(self, name) for name in names}
