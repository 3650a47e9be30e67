"""Options that several compression commands have. Each call makes a new field, because a dataclass changes its fields."""

from __future__ import annotations

from typing import Any

from llmc.options import ADVANCED, CALIBRATION, RUN, option

SAMPLES = 128
PRECISIONS = ("auto", "bf16", "fp32")  # of matrix products in training


def calibration(help: str = "Calibration text: a file, hf:NAME, or self. self is text sampled from the model. "
                     "A .json, .jsonl, .csv, .tsv or .parquet file has rows, any other file is plain text.",
                default: Any = "self", **declared: Any) -> Any:
    return option(default, help=help, metavar="TEXT", **declared)


def samples(help: str = "Number of calibration sequences.", low: int = 1) -> Any:
    return option(SAMPLES, help=help, low=low, group=CALIBRATION)


def seq_len() -> Any:
    return option(512, help="Number of tokens in a sequence.", low=16, high=32768, group=CALIBRATION)


def seed(help: str = "Seed of --calibration self.") -> Any:
    return option(0, help=help, group=CALIBRATION)


def damp(method: str) -> Any:
    return option(0.01, help=f"Damping of {method}: share of the mean of the Hessian's diagonal that is added to it.",
                  above=0, below=1, group=ADVANCED)


def device() -> Any:
    return option("cpu", help="Device: cpu, gpu, or a name that torch knows.", group=RUN)


def resume(unit: str = "layer") -> Any:
    return option(False, help=f"Continue an interrupted run after its last finished {unit}.", group=RUN)


# ------------------------------------------------------------------------------- options of training (distill, heal)


def sampled() -> Any:
    return option(16, help="Number of sequences to sample from the teacher and mix with the given text.", low=0,
                  group=CALIBRATION)


def batch(help: str) -> Any:
    return option(2, help=help, low=1, group=ADVANCED)


def accumulate() -> Any:
    return option(1, help="Number of batches in a step.", low=1, group=ADVANCED)


def rate(help: str, shown: str) -> Any:
    return option(None, help=help, shown=shown, above=0, below=1)


def teacher_top_k() -> Any:
    return option(None, help="Run the teacher first and store this many of its most likely tokens on disk. The teacher is "
                             "then not in memory during training.",
                  shown="all, with the teacher in memory", low=1, group=ADVANCED)


def held_out() -> Any:
    return option(8, help="Number of sequences to hold out. They choose the best step.", low=1, group=CALIBRATION)


def check_every() -> Any:
    return option(20, help="Number of steps between two checks on the held-out text.", low=1, group=ADVANCED)


def patience() -> Any:
    return option(3, help="Stop after this many checks without improvement.", low=1, group=ADVANCED)


def checkpointing() -> Any:
    return option(False, help="Recompute activations instead of storing them. This needs less memory and more time.",
                  group=ADVANCED)


def precision() -> Any:
    return option("auto", help="Precision of matrix products. auto takes bf16 if the processor supports it, else fp32.",
                  choices=PRECISIONS, group=ADVANCED)
