"""The settings of `llmc prune`: one place for names, defaults and what is allowed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmc.compress.ranges import out_of_range
from llmc.errors import UserError

MASKS = ("magnitude", "wanda", "sparsegpt")  # single weights become zero, shapes stay
METHODS = (*MASKS, "depth", "width")
PATTERNS = {"2:4": (2, 4), "4:8": (4, 8)}  # so many zeros in so many weights of a row
ORDERS = ("kl", "influence")
SPARSITY = 0.5  # where neither --sparsity nor --pattern is given
HELD_OUT = 16  # the most sequences that before and after are judged by
OPTIONS = {"sparsity": MASKS, "pattern": MASKS, "drop": ("depth",), "by": ("depth",), "ffn": ("width",),
           "heads": ("width",), "hidden": ("width",), "damp": ("sparsegpt",)}  # which methods they belong to


@dataclass(frozen=True)
class PruneConfig:
    """What `llmc prune` and `llmc.prune` take; see `llmc prune --help` for what each means."""

    method: str = "sparsegpt"
    sparsity: float | None = None
    pattern: str | None = None
    drop: int | None = None
    by: str = "kl"
    ffn: float = 1.0
    heads: float = 1.0
    hidden: float = 1.0
    calibration: str = "self"
    samples: int = 128
    seq_len: int = 512
    seed: int = 0
    damp: float = 0.01
    device: str = "cpu"
    threads: int | None = None
    out: Path | None = None
    resume: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        problems = []
        if self.method not in METHODS:
            problems.append(f"--method {self.method}: must be one of {', '.join(METHODS)}")
        problems += [f"--{name} {getattr(self, name)} goes with --method {' or '.join(methods)}, not {self.method}"
                     for name, methods in OPTIONS.items()
                     if getattr(self, name) != getattr(PruneConfig, name) and self.method not in methods]
        if self.sparsity is not None and self.pattern is not None:
            problems.append("--sparsity leaves the places of the zeros free and --pattern fixes them: give one of them")
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            problems.append(f"--sparsity {self.sparsity:g}: must lie between 0 and 1, the share of weights that become zero")
        if self.pattern is not None and self.pattern not in PATTERNS:
            problems.append(f"--pattern {self.pattern}: must be {' or '.join(PATTERNS)}")
        if self.method == "depth" and self.drop is None:
            problems.append("--method depth needs --drop, how many layers go")
        if self.drop is not None and self.drop < 0:
            problems.append(f"--drop {self.drop}: must be at least 0")
        if self.by not in ORDERS:
            problems.append(f"--by {self.by}: must be {' or '.join(ORDERS)}")
        shares = {name: getattr(self, name) for name in ("ffn", "heads", "hidden")}
        problems += [f"--{name} {share:g}: must be above 0 and at most 1, the share that is kept"
                     for name, share in shares.items() if not 0 < share <= 1]
        if self.method == "width" and all(share == 1 for share in shares.values()):
            problems.append("--method width needs --ffn, --heads or --hidden, the share that is kept")
        problems += out_of_range(self, (), ("damp",))
        if self.samples < 2:
            problems.append(f"--samples {self.samples}: must be at least 2, one of them to judge the result by")
        if problems:
            raise UserError("; ".join(problems), "see `llmc prune --help`")

    @property
    def share(self) -> float:
        """Of the weights that become zero."""
        if self.pattern is not None:
            zeros, of = PATTERNS[self.pattern]
            return zeros / of
        return SPARSITY if self.sparsity is None else self.sparsity

    @property
    def held_out(self) -> int:
        """Sequences that only judge the result: an eighth."""
        return min(HELD_OUT, max(1, self.samples // 8))

    @property
    def sequences(self) -> int:
        """How many are needed: magnitude pruning looks at none but those that judge it."""
        return max(2, self.held_out) if self.method == "magnitude" else self.samples

    def numbers(self) -> dict[str, Any]:
        """The settings that decide the result, for manifests and for the fingerprint of `--resume`."""
        shared = {k: v for k, v in asdict(self).items() if k not in (*OPTIONS, "out", "resume", "dry_run", "threads")}
        own = {name: getattr(self, name) for name, methods in OPTIONS.items() if self.method in methods}
        if self.method in MASKS:
            own["sparsity"] = self.share
        return {**shared, **own}

    @property
    def what(self) -> str:
        """For folder names and plans: 'sparsegpt-50', 'wanda-2of4', 'depth-4', 'width-ffn75-heads50'."""
        if self.method == "depth":
            return f"depth-{self.drop}"
        if self.method == "width":
            shares = {name: getattr(self, name) for name in ("ffn", "heads", "hidden")}
            return "-".join(["width", *(f"{name}{100 * share:.0f}" for name, share in shares.items() if share != 1)])
        return f"{self.method}-{self.pattern.replace(':', 'of') if self.pattern else f'{100 * self.share:.0f}'}"
