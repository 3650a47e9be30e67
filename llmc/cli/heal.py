"""llmc heal"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from llmc.compress.heal.config import HealConfig
from llmc.console import duration, set_quiet

D = HealConfig(teacher="-")


def heal(
    model: Annotated[str, typer.Argument(help="The folder that `llmc quantize` made.")],
    teacher: Annotated[str, typer.Option(help="The float model it was made from: a folder, a .gguf file, or a hub id.")],
    calibration: Annotated[list[str], typer.Option(
        help="Healing text: a text or .jsonl file, hf:NAME, or self (sampled from the teacher). May be given again.",
        show_default="self")] = list(D.calibration),  # noqa: B006 - typer wants a list
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = D.steps,
    batch: Annotated[int, typer.Option(help="Sequences of a step.")] = D.batch,
    seq_len: Annotated[int, typer.Option(help="Tokens of a sequence.")] = D.seq_len,
    lr: Annotated[float, typer.Option(help="Learning rate of the scales' logarithms (Adam, warm-up, cosine).")] = D.lr,
    norms: Annotated[bool, typer.Option("--norms/--no-norms", help="Train the weights of norms too.")] = D.norms,
    held_out: Annotated[int, typer.Option(help="Sequences of the text kept back to choose the best step by.")] = D.held_out,
    check_every: Annotated[int, typer.Option(help="Steps between two looks at the held-out text.")] = D.check_every,
    patience: Annotated[int, typer.Option(help="Stop after so many looks without a better one.")] = D.patience,
    checkpointing: Annotated[bool, typer.Option(
        "--checkpointing", help="Compute activations twice and keep few of them: less memory, more time.",
    )] = D.checkpointing,
    seed: Annotated[int, typer.Option(help="Seed of the order of sequences and of self-sampled text.")] = D.seed,
    device: Annotated[str, typer.Option(help="cpu, gpu, or a torch device.")] = D.device,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="physical cores")] = D.threads,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Output folder.", show_default="MODEL-healed")] = D.out,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the last look at the held-out text.")] = D.resume,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train the scales of a quantised model so that it says what the float model says.

    No code changes: size, format and speed stay as they are. Heal on text like what the model will see, judge on other
    text.
    """
    config = HealConfig(teacher, tuple(calibration), steps, batch, seq_len, lr, norms, held_out, check_every, patience,
                        checkpointing, seed, device, threads, out, resume)
    if as_json:
        set_quiet(True)
    from llmc.compress.heal.run import heal as run

    result = run(model, config)
    print(json.dumps(result, indent=2) if as_json else _summary(result))


def _summary(r: dict[str, Any]) -> str:
    before, after = r["kld"]["before"], r["kld"]["after"]
    return (f"{r['out']}: held-out KLD {before:.4f} -> {after:.4f} ({after / before:.2f}x) at step {r['best_step']} of "
            f"{r['steps']}, scales moved {100 * r['scales_moved']:.1f} % on average, {duration(r['seconds'])}\n"
            f"next: llmc export --format gguf {r['out']}")


def register(app: typer.Typer) -> None:
    app.command()(heal)
