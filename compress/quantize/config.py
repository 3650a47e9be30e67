"""The options of `llmc quantize`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmc import options
from llmc.compress import shared_options as shared
from llmc.compress.quantize.presets import PRESETS
from llmc.console import parse_size, size
from llmc.formats.types import BLOCK_TYPES
from llmc.options import ADVANCED, CALIBRATION, check, option

INTEGER = {"q4_0": 4, "q8_0": 8}  # bits of the block types that are also integer types; GPTQ checkpoints can hold them

METHODS = ("gptq", "rtn")
GOALS = {"gguf": "q4_k_m"}  # --goal: the preset of llama.cpp whose size is the budget
TRANSFORMS = ("none", "scaling", "rotate", "rotate+scaling", "auto")
BITS = (4, 8)
DEFAULT_BITS = 4
TOKENS_PER_COLUMN = 8  # of the widest matrix, that the default number of sequences gives
GROUP_SIZES = (32, 64, 128)
FALLBACKS = tuple(name for name, qtype in BLOCK_TYPES.items() if qtype.block == 32)


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """The options of `llmc quantize` and `llmc.quantize`."""

    bits: int | None = option(None, help="Number of bits of a weight's code.", choices=BITS, shown="4")
    goal: str | None = option(
        None, help="What the model is made for, instead of --bits. gguf is llama.cpp alone: llmc measures how sensitive each "
                   "tensor is and chooses its type, in a file no larger than llama.cpp's Q4_K_M. It is the same as "
                   "--target-size as:q4_k_m. --bits 4 can also be exported to ONNX.", choices=tuple(GOALS))
    type: str | None = option(None, help="GGUF weight type of all linears, instead of --bits.", choices=tuple(BLOCK_TYPES))
    fallback: str | None = option(
        None, help="Weight type of rows that --type cannot hold, because 256 does not divide them. It has blocks of 32: "
                   f"{', '.join(FALLBACKS)}.", group=ADVANCED, shown="iq4_nl, q5_0, q5_1 or q8_0")
    preset: str | None = option(
        None, help="llama.cpp's mix of weight types. The export gives embedding and head the types of the mix.",
        choices=tuple(PRESETS))
    target_size: str | None = option(
        None, help="Largest size of the .gguf file, as in 90MB or 1.2GB. as:q4_k_m takes the size of that preset's file. "
                   "llmc measures how sensitive each tensor is and chooses its type.", metavar="SIZE")
    target_bpw: float | None = option(
        None, help="Like --target-size, but as bits per weight over all tensors of the file, as in 4.25.", above=0,
        group=ADVANCED)
    target_kld: float | None = option(
        None, help="Find the smallest file whose predicted KL divergence is at most this, as in 0.05.", above=0,
        group=ADVANCED)
    keep: str | None = option(
        None, help="Parameters of the decoder layers that stay floats: parts of their names, with commas between them, as in "
                   "layers.0.,v_proj. * stands for anything.", metavar="PATTERNS", shown="none", group=ADVANCED)
    type_of: str | None = option(
        None, help="GGUF types of some linears, against --bits, --type, --preset or a target: parts of their names with a "
                   "type, with commas between them, as in down_proj=q6_k,layers.0.=q8_0. * stands for anything. The last "
                   "that fits counts.", metavar="PATTERN=TYPE", shown="none", group=ADVANCED)
    method: str = option(
        "gptq", help="Rounding method. gptq compensates errors and needs text. rtn rounds to nearest and needs no text.",
        choices=METHODS, group=ADVANCED)
    imatrix: Path | None = option(
        None, help="Importance matrix (.gguf) of llmc or llama.cpp. It weights the columns for --method rtn.", shown="none",
        group=CALIBRATION)
    group_size: int = option(32, help="Number of weights that share a scale.", choices=GROUP_SIZES, group=ADVANCED)
    sym: bool = option(
        True, help="Fix the zero point (--sym) or store one for each group (--asym). Q4_0 and Q8_0 files need --sym.",
        flags=("--sym/--asym",), group=ADVANCED)
    carry: bool = option(
        True, help="Keep the codes of weights that lie on a weight type already, as in models trained for a type and in "
                   "dequantized files (--carry), or round them like others (--no-carry). Without --bits, --type, --preset "
                   "or a target, a model of such weights keeps its types.", flags=("--carry/--no-carry",), group=ADVANCED)
    calibration: str = shared.calibration()
    samples: int = option(
        0, help="Number of calibration sequences. 0 means that llmc chooses.", low=0, group=CALIBRATION,
        shown=f"{shared.SAMPLES}, more for {TOKENS_PER_COLUMN} tokens per column of the widest matrix, fewer if the text is "
              "shorter")
    seq_len: int = shared.seq_len()
    seed: int = shared.seed()
    damp: float = shared.damp("GPTQ")
    true_sequential: bool = option(
        True, help="Calibrate each linear after the linears before it are quantized (--true-sequential), or calibrate all "
                   "linears of a layer at once (--one-pass).", flags=("--true-sequential/--one-pass",), group=CALIBRATION)
    device: str = shared.device()
    threads: int | None = options.threads()
    out: Path | None = options.out("Folder to write.", "MODEL-METHOD-WHAT")
    resume: bool = shared.resume()
    dry_run: bool = options.dry_run()
    transform: str = option(
        "none", help="Apply an equivalent transformation first. The outputs stay the same, and the model is easier to "
                     "quantize. scaling scales channels. rotate rotates channels where this adds no bytes. auto takes what "
                     "measures best on held-out calibration text.", choices=TRANSFORMS, group=ADVANCED)
    heal: int = option(
        0, help="Number of healing steps after quantization, on the same text with MODEL as teacher. `llmc heal` takes 160 "
                "by default. 0 means no healing.", low=0, group=ADVANCED)
    lose_zeros: bool = option(
        False, help="Accept a type or transformation that does not keep the zeros of a pruned model.", group=ADVANCED)

    def __post_init__(self) -> None:
        problems = []
        if self.imatrix and self.method == "gptq":
            problems.append("--imatrix goes with --method rtn: GPTQ gathers better statistics itself")
        if self.type and self.preset:
            problems.append("--type and --preset both choose the types of linears: give one of them")
        targets = {f"--goal {self.goal}": self.goal, "--target-size": self.target_size, "--target-bpw": self.target_bpw,
                   "--target-kld": self.target_kld}
        given = [name for name, value in targets.items() if value is not None]
        if len(given) > 1:
            problems.append(f"{' and '.join(given)}: give one target")
        if given and (self.type or self.preset):
            problems.append(f"{given[0]} chooses the types itself: leave out --type and --preset")
        if self.goal is None and self.peer is not None and self.peer not in PRESETS:
            problems.append(f"--target-size {self.target_size}: the preset after as: must be one of {', '.join(PRESETS)}")
        if self.target_size is not None and self.peer is None and parse_size(self.target_size) is None:
            problems.append(f"--target-size {self.target_size}: give bytes with a unit, as in 90MB, 1.2GB or 85MiB, or "
                            "as:PRESET")
        if self.keep is not None and self.transform != "none":
            problems.append("--keep goes without --transform, which is chosen with every linear rounded: run "
                            "`llmc transform` first")
        if self.transform != "none" and (self.preset or given):
            problems.append(f"--transform {self.transform} needs one type for all linears: give --type or --bits, or run "
                            "`llmc transform` first")
        named = "--type" if self.type else "--preset" if self.preset else given[0] if given else ""
        if named and (self.code_bits, self.group_size, self.sym) != (DEFAULT_BITS, 32, True):
            problems.append(f"{named} sets bits, group and symmetry: leave out --bits, --group-size and --asym")
        if wrong := [pattern or qtype for pattern, qtype in self.named_types if not pattern or qtype not in BLOCK_TYPES]:
            problems.append(f"--type-of {wrong[0]}: give NAME=TYPE, as in down_proj=q6_k. Types: {', '.join(BLOCK_TYPES)}")
        if self.type_of and (self.transform != "none" or not self.sym):
            problems.append("--type-of goes without --transform and --asym, which are for one type in all linears")
        if self.fallback is not None and self.fallback not in FALLBACKS:
            problems.append(f"--fallback {self.fallback}: must be a type with blocks of 32: {', '.join(FALLBACKS)}")
        if self.fallback and not self.type:
            problems.append("--fallback is the type of rows that --type cannot hold: give --type")
        check(self, "quantize", problems)

    @property
    def named_types(self) -> list[tuple[str, str]]:
        """(part of a name, type) of --type-of, in the order given."""
        parts = (part.rpartition("=") for part in (self.type_of or "").split(",") if part)
        return [(pattern, qtype) for pattern, _, qtype in parts]

    @property
    def code_bits(self) -> int:
        """--bits, or its default."""
        return self.bits or DEFAULT_BITS

    @property
    def typed(self) -> bool:
        """Whether the user asks for types: weights that lie on another type are then rounded."""
        return (self.bits is not None or (self.group_size, self.sym) != (32, True)
                or any(x is not None for x in (self.type, self.preset, self.target)))

    @property
    def calibrated(self) -> bool:
        """Whether calibration text is needed."""
        return self.method == "gptq" or self.transform != "none"

    @property
    def target(self) -> str | None:
        """The budget option as given: '--target-size 90MB'; None without a budget."""
        if self.goal is not None:
            return f"--goal {self.goal}"
        for name in ("target_size", "target_bpw", "target_kld"):
            if (value := getattr(self, name)) is not None:
                return f"--{name.replace('_', '-')} {value}"
        return None

    @property
    def peer(self) -> str | None:
        """The preset of --target-size as:PRESET or of --goal, whose file size is the budget; else None."""
        if self.goal is not None:
            return GOALS[self.goal]
        prefix, _, preset = (self.target_size or "").partition(":")
        return preset if prefix == "as" else None

    def numbers(self) -> dict[str, Any]:
        """The options that affect the result, for manifests and for the fingerprint of `--resume`. Round-to-nearest without
        transform or budget leaves out the calibration options."""
        deciding = {**asdict(self), "bits": self.code_bits, "imatrix": self.imatrix and self.imatrix.name}
        for name in ("out", "resume", "dry_run", "heal"):  # healing has its own manifest entry
            del deciding[name]
        for name in ("goal", "keep", "type_of"):
            if deciding[name] is None:
                del deciding[name]
        if self.method == "rtn":
            text = () if self.calibrated or self.target else ("calibration", "samples", "seq_len", "seed")
            for name in ("damp", "true_sequential", *text):
                del deciding[name]
        return deciding


def budget_lines(plan: dict[str, Any], counts: dict[str, int], end_types: dict[str, str]) -> str:
    """The plan of a budget as printed lines. counts: {type: number of linears}.  end_types: of embedding and head."""
    types = ", ".join(f"{n} {qtype}" for qtype, n in counts.items())
    ends = "".join(f", {end} {qtype}" for end, qtype in end_types.items())
    classes = ", ".join(f"{name} {size(n)}" for name, n in plan["bytes_by_class"].items())
    other = plan.get("peer")
    peer = (f"  {other['preset']} itself: {size(other['file_bytes'])}, predicted KL divergence "
            f"{other['predicted_kld']:.3g}\n") if other else ""
    return (f"  {plan['target']}: {size(plan['file_bytes'])} as .gguf, {plan['bits_per_weight']:.3f} bits per weight, "
            f"predicted KL divergence {plan['predicted_kld']:.3g}\n{peer}"
            f"  types  {types}{ends}\n  bytes  {classes}")


def carried_lines(counts: dict[str, dict[str, int]]) -> str:
    """'99.97 % of the blocks of 210 linears lie on q4_0: carried over', one line for each type. Rounded down: 100 % is all.
    counts: {type: {'linears', 'blocks', 'carried'}}."""
    shares = {qtype: int(10_000 * n["carried"] / n["blocks"]) / 100 for qtype, n in counts.items()}
    return "".join(f"{shares[qtype]:g} % of the blocks of {n['linears']} linears lie on {qtype}: carried over\n"
                   for qtype, n in counts.items())
