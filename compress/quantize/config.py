"""The settings of `llmc quantize`: one place for names, defaults and what is allowed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmc.compress.quantize.presets import PRESETS
from llmc.compress.ranges import out_of_range
from llmc.console import parse_size, size
from llmc.errors import UserError
from llmc.formats.types import BLOCK_TYPES

INTEGER = {"q4_0": 4, "q8_0": 8}  # block types that are integer types, which GPTQ checkpoints hold too

METHODS = ("gptq", "rtn")
TRANSFORMS = ("none", "scaling", "rotate", "rotate+scaling", "auto")
BITS = (4, 8)
GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class QuantizeConfig:
    """What `llmc quantize` and `llmc.quantize` take; see `llmc quantize --help` for what each means."""

    bits: int = 4
    type: str | None = None
    fallback: str | None = None
    preset: str | None = None
    target_size: str | None = None
    target_bpw: float | None = None
    target_kld: float | None = None
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
    heal: int = 0
    lose_zeros: bool = False

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
        problems += [f"--{option} {name}: must be one of {', '.join(BLOCK_TYPES)}"
                     for option, name in (("type", self.type), ("fallback", self.fallback)) if name and name not in BLOCK_TYPES]
        if self.preset and self.preset not in PRESETS:
            problems.append(f"--preset {self.preset}: must be one of {', '.join(PRESETS)}")
        if self.type and self.preset:
            problems.append("--type gives all linears one type and --preset each its own: give one of them")
        targets = {"--target-size": self.target_size, "--target-bpw": self.target_bpw, "--target-kld": self.target_kld}
        given = [name for name, value in targets.items() if value is not None]
        if len(given) > 1:
            problems.append(f"{' and '.join(given)}: give one target")
        if given and (self.type or self.preset):
            problems.append(f"{given[0]} chooses the types itself: leave out --type and --preset")
        problems += [f"{name} {value:g}: must be above 0" for name, value in targets.items()
                     if isinstance(value, float) and not value > 0]
        if self.peer is not None and self.peer not in PRESETS:
            problems.append(f"--target-size {self.target_size}: after as: must come one of {', '.join(PRESETS)}")
        if self.target_size is not None and self.peer is None and parse_size(self.target_size) is None:
            problems.append(f"--target-size {self.target_size}: give bytes with a unit, as in 90MB, 1.2GB or 85MiB, or "
                            "as:PRESET")
        if self.transform != "none" and (self.preset or given):
            problems.append(f"--transform {self.transform} is searched on one type: give --type or --bits, or run "
                            "`llmc transform` first")
        option = "--type" if self.type else "--preset" if self.preset else given[0] if given else ""
        if option and (self.bits, self.group_size, self.sym) != (4, 32, True):
            problems.append(f"{option} names bits, group and symmetry itself: leave out --bits, --group-size and --asym")
        if self.fallback in BLOCK_TYPES and BLOCK_TYPES[self.fallback].block != 32:
            problems.append(f"--fallback {self.fallback}: must be a type with blocks of 32")
        if self.fallback and not self.type:
            problems.append("--fallback says what to do with rows that --type cannot hold: give --type")
        problems += out_of_range(self, ("samples",), ("damp",))
        if self.heal < 0:
            problems.append(f"--heal {self.heal}: must be at least 0 steps")
        if problems:
            raise UserError("; ".join(problems), "see `llmc quantize --help`")

    @property
    def calibrated(self) -> bool:
        """Whether text is needed."""
        return self.method == "gptq" or self.transform != "none"

    @property
    def target(self) -> str | None:
        """The budget as it was given: '--target-size 90MB'."""
        for name in ("target_size", "target_bpw", "target_kld"):
            if (value := getattr(self, name)) is not None:
                return f"--{name.replace('_', '-')} {value}"
        return None

    @property
    def peer(self) -> str | None:
        """The preset of --target-size as:PRESET: its file's size is the budget."""
        prefix, _, preset = (self.target_size or "").partition(":")
        return preset if prefix == "as" else None

    def numbers(self) -> dict[str, Any]:
        """The settings that decide the result, for manifests and for the fingerprint of `--resume`."""
        deciding = {**asdict(self), "imatrix": self.imatrix and self.imatrix.name}
        for name in ("out", "resume", "dry_run", "heal"):  # healing has an entry of its own
            del deciding[name]
        if self.method == "rtn":
            text = () if self.calibrated or self.target else ("calibration", "samples", "seq_len", "seed")
            for name in ("damp", "true_sequential", *text):
                del deciding[name]
        return deciding


def budget_lines(plan: dict[str, Any], counts: dict[str, int], tables: dict[str, str]) -> str:
    """The plan of a budget for people."""
    types = ", ".join(f"{n} {qtype}" for qtype, n in counts.items())
    ends = "".join(f", {table} {qtype}" for table, qtype in tables.items())
    classes = ", ".join(f"{name} {size(n)}" for name, n in plan["bytes_by_class"].items())
    other = plan.get("peer")
    peer = (f"  {other['preset']} itself: {size(other['file_bytes'])}, by the same measure predicted at "
            f"{other['predicted_kld']:.3g}\n") if other else ""
    return (f"  {plan['target']}: {size(plan['file_bytes'])} as .gguf, {plan['bits_per_weight']:.3f} bits per weight, "
            f"predicted KL divergence {plan['predicted_kld']:.3g}\n{peer}"
            f"  types  {types}{ends}\n  bytes  {classes}")
