"""The options of `llmc heal`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmc import options
from llmc.compress import shared_options as shared
from llmc.options import ADVANCED, check, option

SCOPES = ("end-to-end", "block")


@dataclass(frozen=True, kw_only=True)
class HealConfig:
    """The options of `llmc heal` and `llmc.heal`."""

    teacher: str = option(
        help="Float model to learn from: a folder, a .gguf file, or a hub id. It is the model that was quantized. With "
             "--scope end-to-end it may be a larger model with the same tokenizer.", metavar="MODEL")
    calibration: tuple[str, ...] = shared.calibration(
        "Text to train on: a file, hf:NAME, or self. self is text sampled from the teacher. The option may be "
        "repeated.", ("self",))
    sampled: int = shared.sampled()
    scope: str = option(
        "end-to-end", help="What is compared with the teacher. end-to-end compares logits. block trains one layer at a time, "
                           "compares its output, and needs the memory of one layer.", choices=SCOPES)
    steps: int = option(160, help="Number of optimizer steps. With --scope block it counts for each layer.", low=1)
    batch: int = shared.batch("Number of sequences in a batch.")
    accumulate: int = shared.accumulate()
    seq_len: int = shared.seq_len()
    lr: float | None = shared.rate(
        "Learning rate of the scales' logarithms (Adam with warm-up and cosine decay).",
        "set by the divergence at the start, at most 0.001; 0.001 with --scope block")
    norms: bool = option(True, help="Train the weights of norms too.", flags=("--norms/--no-norms",), group=ADVANCED)
    teacher_top_k: int | None = shared.teacher_top_k()
    held_out: int = shared.held_out()
    check_every: int = shared.check_every()
    patience: int = shared.patience()
    checkpointing: bool = shared.checkpointing()
    precision: str = shared.precision()
    seed: int = shared.seed("Seed of the order of sequences and of --calibration self.")
    device: str = shared.device()
    threads: int | None = options.threads()
    out: Path | None = options.out("Folder to write.", "MODEL-healed")
    resume: bool = shared.resume("check on the held-out text, or its last finished layer")
    dry_run: bool = options.dry_run()

    def __post_init__(self) -> None:
        problems = []
        if not self.teacher:
            problems.append("--teacher is missing: give the float model that was quantized")
        if self.scope == "block" and (self.teacher_top_k is not None or self.checkpointing):
            problems.append("--teacher-top-k and --checkpointing go with --scope end-to-end: --scope block uses no logits of "
                            "the teacher and holds the activations of one layer")
        check(self, "heal", problems)

    def numbers(self) -> dict[str, Any]:
        """The options that affect the result, for manifests and for the fingerprint of `--resume`."""
        deciding = asdict(self)
        for name in ("out", "resume", "device", "dry_run"):
            del deciding[name]
        return deciding
