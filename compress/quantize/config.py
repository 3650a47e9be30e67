"""The settings of `llmc quantize`: one place for names, defaults and what is allowed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmc.block_grids import FALLBACK, GRIDS, BlockGrid
from llmc.errors import UserError
from llmc.grids import Grid

AnyGrid = Grid | BlockGrid
INTEGER = {"q4_0": 4, "q8_0": 8}  # block grids that are integer grids, which GPTQ checkpoints hold too

METHODS = ("gptq", "rtn")
TRANSFORMS = ("none", "gauge", "rotate", "auto")
BITS = (4, 8)
GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class QuantizeConfig:
    """What `llmc quantize` and `llmc.quantize` take; see `llmc quantize --help` for what each means."""

    bits: int = 4
    grid: str | None = None
    fallback: str | None = None
    method: str = "gptq"
    imatrix: Path | None = None
    group_size: int = 32
    sym: bool = True
    calibration: str = "self"
    samples: int = 128
    seq_len: int = 512
    seed: int = 0
    damp: float = 0.01
    true_sequential: bool = True
    device: str = "cpu"
    threads: int | None = None
    out: Path | None = None
    resume: bool = False
    dry_run: bool = False
    transform: str = "none"

    def __post_init__(self) -> None:
        problems = []
        if self.bits not in BITS:
            problems.append(f"--bits {self.bits}: must be 4 or 8")
        if self.method not in METHODS:
            problems.append(f"--method {self.method}: must be gptq or rtn")
        if self.imatrix and self.method == "gptq":
            problems.append("--imatrix goes with --method rtn: GPTQ gathers its own statistics, which say more")
        if self.transform not in TRANSFORMS:
            problems.append(f"--transform {self.transform}: must be {', '.join(TRANSFORMS)}")
        if self.group_size not in GROUP_SIZES:
            problems.append(f"--group-size {self.group_size}: must be 32, 64 or 128")
        problems += [f"--{option} {name}: must be one of {', '.join(GRIDS)}"
                     for option, name in (("grid", self.grid), ("fallback", self.fallback)) if name and name not in GRIDS]
        if self.grid and (self.bits, self.group_size, self.sym) != (4, 32, True):
            problems.append("--grid names bits, group and symmetry itself: leave out --bits, --group-size and --asym")
        if self.fallback in GRIDS and GRIDS[self.fallback].block != 32:
            problems.append(f"--fallback {self.fallback}: must be a grid with blocks of 32")
        if self.fallback and not self.grid:
            problems.append("--fallback says what to do with rows that --grid cannot hold: give --grid")
        if self.samples < 1:
            problems.append(f"--samples {self.samples}: must be at least 1")
        if not 16 <= self.seq_len <= 32768:
            problems.append(f"--seq-len {self.seq_len}: must be 16 … 32768")
        if not 0 < self.damp < 1:
            problems.append(f"--damp {self.damp}: must lie between 0 and 1")
        if self.threads is not None and self.threads < 1:
            problems.append(f"--threads {self.threads}: must be at least 1")
        if problems:
            raise UserError("; ".join(problems), "see `llmc quantize --help`")

    @property
    def calibrated(self) -> bool:
        """Whether text is needed."""
        return self.method == "gptq" or self.transform != "none"

    def grid_of(self, width: int) -> AnyGrid:
        """The grid of a linear with rows of `width` weights."""
        if self.grid is None:
            return Grid(self.bits, self.group_size, self.sym)
        if self.grid in INTEGER:
            return Grid(INTEGER[self.grid], 32)
        grid = GRIDS[self.grid]
        return GRIDS[self.fallback or FALLBACK.get(self.grid, self.grid)] if width % grid.block else grid

    def numbers(self) -> dict[str, Any]:
        """The settings that decide the result, for manifests and for the fingerprint of `--resume`."""
        deciding = {**asdict(self), "imatrix": self.imatrix and self.imatrix.name}
        for name in ("out", "resume", "dry_run"):
            del deciding[name]
        if self.method == "rtn":
            text = () if self.calibrated else ("calibration", "samples", "seq_len", "seed")
            for name in ("damp", "true_sequential", *text):
                del deciding[name]
        return deciding
