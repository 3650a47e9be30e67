"""The options of `llmc distill`."""

from __future__ import annotations

from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import Any

from llmc import options
from llmc.compress import shared_options as shared
from llmc.options import ADVANCED, CALIBRATION, check, option

LOSSES = ("forward-kl", "reverse-kl")
AUTO = "auto"
FULL_LR, LORA_LR = 1e-4, 5e-4


@dataclass(frozen=True)
class DistillConfig:
    """The options of `llmc distill` and `llmc.distill`."""

    teacher: str = option(help="Float model to learn from: a folder, a .gguf file, or a hub id.", metavar="MODEL")
    _: KW_ONLY
    calibration: tuple[str, ...] = shared.calibration(
        "Text to train on: a file, hf:NAME, or self. self is text sampled from the teacher. The option may be "
        "repeated.", ("self",))
    sampled: int = shared.sampled()
    steps: int = option(200, help="Number of optimizer steps.", low=1)
    batch: int = shared.batch("Number of sequences in a batch of each process.")
    accumulate: int = shared.accumulate()
    seq_len: int = shared.seq_len()
    lr: float | None = shared.rate(
        "Learning rate (AdamW with warm-up and cosine decay).", f"{FULL_LR:g}, or {LORA_LR:g} with --lora")
    weight_decay: float = option(0.0, help="Weight decay of matrices (AdamW).", low=0, group=ADVANCED)
    clip: float = option(1.0, help="Largest norm of a step's gradient.", above=0, group=ADVANCED)
    loss: str = option(
        "forward-kl", help="Loss. With forward-kl the student learns to cover all that the teacher predicts. With reverse-kl "
                           "it learns to predict nothing that the teacher does not.", choices=LOSSES, group=ADVANCED)
    temperature: float = option(
        1.0, help="Temperature of both distributions. The loss is multiplied by its square.", above=0, group=ADVANCED)
    ce_weight: float = option(
        0.0, help="Share of the cross-entropy on the text's own next tokens in the loss.", low=0, high=1, group=ADVANCED)
    hidden_weight: float = option(
        0.0, help="Weight of the error of hidden states, which is added to the loss. Learned projections map the student's "
                  "states to the teacher's.", low=0, group=ADVANCED)
    layer_map: str = option(
        AUTO, help="Layers that --hidden-weight compares, counted from 0, as pairs STUDENT:TEACHER: 0:0,8:9,26:29. auto "
                   "spreads the student's layers evenly over the teacher's.", metavar="PAIRS", group=ADVANCED)
    teacher_top_k: int | None = shared.teacher_top_k()
    lora: int | None = option(
        None, help="Rank of LoRA adapters to train instead of all weights. They are merged at the end. This needs the "
                   "package peft.", shown="full weights", low=1)
    held_out: int = shared.held_out()
    check_every: int = shared.check_every()
    patience: int = shared.patience()
    answers_only: bool = option(
        False, help="Train only on what assistants say in the conversations of files with rows.", group=CALIBRATION)
    checkpointing: bool = shared.checkpointing()
    precision: str = shared.precision()
    seed: int = shared.seed("Seed of the order of sequences, of --calibration self and of adapters.")
    device: str = shared.device()
    threads: int | None = options.threads()
    out: Path | None = options.out("Folder to write.", "STUDENT-distilled")
    resume: bool = shared.resume("check on the held-out text")
    dry_run: bool = options.dry_run()

    def __post_init__(self) -> None:
        problems = []
        if not self.teacher:
            problems.append("--teacher is missing: give the model that the student learns from")
        try:
            self.pairs()
        except ValueError:
            problems.append(f"--layer-map {self.layer_map}: must be auto, or pairs STUDENT:TEACHER of layers, as in "
                            "0:0,8:9,26:29")
        if self.layer_map != AUTO and not self.hidden_weight:
            problems.append("--layer-map goes with --hidden-weight: without --hidden-weight no states are compared")
        if self.hidden_weight and self.teacher_top_k is not None:
            problems.append("--hidden-weight and --teacher-top-k exclude each other: --teacher-top-k stores the teacher's "
                            "most likely tokens, not its hidden states")
        check(self, "distill", problems)

    @property
    def rate(self) -> float:
        """The learning rate: --lr if given, else the default for full weights or for adapters."""
        return self.lr if self.lr is not None else FULL_LR if self.lora is None else LORA_LR

    def pairs(self) -> list[tuple[int, int]] | None:
        """The pairs (student's layer, teacher's layer) of --layer-map; None for auto."""
        if self.layer_map == AUTO:
            return None
        found = [pair.split(":") for pair in self.layer_map.split(",")]
        return [(int(student), int(teacher)) for student, teacher in found]

    def numbers(self) -> dict[str, Any]:
        """The options that affect the result, for manifests and for the fingerprint of `--resume`."""
        deciding = asdict(self) | {"lr": self.rate}
        for name in ("out", "resume", "device", "dry_run"):
            del deciding[name]
        return deciding
