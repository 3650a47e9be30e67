"""The options of `llmc prune`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmc import options
from llmc.compress import shared_options as shared
from llmc.options import ADVANCED, check, option

MASKS = ("magnitude", "wanda", "sparsegpt")  # single weights become zero, shapes do not change
METHODS = (*MASKS, "depth", "width")
PATTERNS = {"2:4": (2, 4), "4:8": (4, 8)}  # (zeros, weights) of each run of weights in a row
ORDERS = ("kl", "influence")
SPARSITY = 0.5  # if neither --sparsity nor --pattern is given
HELD_OUT = 16  # the largest number of held-out sequences
OPTIONS = {"sparsity": MASKS, "pattern": MASKS, "drop": ("depth",), "by": ("depth",), "ffn": ("width",),
           "heads": ("width",), "hidden": ("width",), "damp": ("sparsegpt",)}  # option -> the methods that have it


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """The options of `llmc prune` and `llmc.prune`."""

    method: str = option(
        "sparsegpt", help="Pruning method. sparsegpt zeroes weights and lets the others compensate. wanda zeroes by weight "
                          "and input. magnitude zeroes by weight alone and needs no text. depth removes layers. width "
                          "removes neurons, heads and channels.", choices=METHODS)
    sparsity: float | None = option(
        None, help="Share of weights that become zero, the same in every linear.", shown=f"{SPARSITY}", above=0, below=1)
    pattern: str | None = option(
        None, help="Pattern of zeros in each row. 2:4 makes 2 of every 4 weights zero.", shown="none",
        choices=tuple(PATTERNS))
    drop: int | None = option(None, help="Number of layers that --method depth removes.", low=0, shown="none")
    by: str = option(
        "kl", help="How --method depth chooses layers. kl removes, one at a time, the layer whose removal adds the least KL "
                   "divergence. It needs the whole model in memory. influence removes the layers with the highest cosine "
                   "similarity of input and output.", choices=ORDERS, group=ADVANCED)
    ffn: float = option(
        1.0, help="Share of feed-forward neurons that --method width keeps. The number is rounded to a multiple of 256 if "
                  "one is near, else of 32.", above=0, high=1, group=ADVANCED)
    heads: float = option(
        1.0, help="Share of attention heads that --method width keeps, in whole key-value groups.", above=0, high=1,
        group=ADVANCED)
    hidden: float = option(
        1.0, help="Share of the residual stream's channels that --method width keeps. The number is rounded to a multiple of "
                  "256 or 32.", above=0, high=1, group=ADVANCED)
    calibration: str = shared.calibration()
    samples: int = shared.samples(
        "Number of sequences. An eighth of them, at most 16, is held out to judge the result.", low=2)
    seq_len: int = shared.seq_len()
    seed: int = shared.seed()
    damp: float = shared.damp("SparseGPT")
    device: str = shared.device()
    threads: int | None = options.threads()
    out: Path | None = options.out("Folder to write.", "MODEL-METHOD-SHARE")
    resume: bool = shared.resume()
    dry_run: bool = options.dry_run()

    def __post_init__(self) -> None:
        problems = [f"--{name} {getattr(self, name)} goes with --method {' or '.join(methods)}, not {self.method}"
                    for name, methods in OPTIONS.items()
                    if getattr(self, name) != getattr(PruneConfig, name) and self.method not in methods]
        if self.sparsity is not None and self.pattern is not None:
            problems.append("--pattern fixes the share of zeros too, so --sparsity does not go with it: give one of them")
        if self.method == "depth" and self.drop is None:
            problems.append("--method depth needs --drop: give the number of layers to remove")
        if self.method == "width" and self.ffn == self.heads == self.hidden == 1:
            problems.append("--method width needs --ffn, --heads or --hidden: give the share to keep")
        check(self, "prune", problems)

    @property
    def share(self) -> float:
        """The share of weights that become zero."""
        if self.pattern is not None:
            zeros, of = PATTERNS[self.pattern]
            return zeros / of
        return SPARSITY if self.sparsity is None else self.sparsity

    @property
    def held_out(self) -> int:
        """The number of sequences that only judge the result: an eighth of --samples, at least 1, at most HELD_OUT."""
        return min(HELD_OUT, max(1, self.samples // 8))

    @property
    def sequences(self) -> int:
        """The number of sequences to load. Magnitude pruning needs only the held-out ones."""
        return max(2, self.held_out) if self.method == "magnitude" else self.samples

    def numbers(self) -> dict[str, Any]:
        """The options that affect the result, for manifests and for the fingerprint of `--resume`."""
        shared = {k: v for k, v in asdict(self).items() if k not in (*OPTIONS, "out", "resume", "dry_run", "threads")}
        own = {name: getattr(self, name) for name, methods in OPTIONS.items() if self.method in methods}
        if self.method in MASKS:
            own["sparsity"] = self.share
        return {**shared, **own}

    @property
    def what(self) -> str:
        """A name for folders and plans: 'sparsegpt-50', 'wanda-2of4', 'depth-4', 'width-ffn75-heads50'."""
        if self.method == "depth":
            return f"depth-{self.drop}"
        if self.method == "width":
            shares = {name: getattr(self, name) for name in ("ffn", "heads", "hidden")}
            return "-".join(["width", *(f"{name}{100 * share:.0f}" for name, share in shares.items() if share != 1)])
        return f"{self.method}-{self.pattern.replace(':', 'of') if self.pattern else f'{100 * self.share:.0f}'}"
