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
    teacher: Annotated[str, typer.Option(
        help="The float model to learn from, a folder, a .gguf file, or a hub id: the one it was made from, or a larger one "
             "with its tokenizer, as a pruned model's base (--scope end-to-end).")],
    calibration: Annotated[list[str], typer.Option(
        help="Healing text: a text or .jsonl file, hf:NAME, or self (sampled from the teacher). May be given again.",
        show_default="self")] = list(D.calibration),  # noqa: B006 - typer wants a list
    sampled: Annotated[int, typer.Option(
        help="Sequences of the teacher's own text mixed in with the given ones.")] = D.sampled,
    scope: Annotated[str, typer.Option(
        help="end-to-end (against the teacher's logits), or block: one layer at a time against the teacher's layer, in the "
             "memory of one layer.")] = D.scope,
    steps: Annotated[int, typer.Option(help="Optimiser steps; with --scope block, of each layer.")] = D.steps,
    batch: Annotated[int, typer.Option(help="Sequences run at once.")] = D.batch,
    accumulate: Annotated[int, typer.Option(help="Batches of a step.")] = D.accumulate,
    seq_len: Annotated[int, typer.Option(help="Tokens of a sequence.")] = D.seq_len,
    lr: Annotated[float | None, typer.Option(
        help="Learning rate of the scales' logarithms (Adam, warm-up, cosine).",
        show_default="by the divergence at the start, at most 0.001; 0.001 with --scope block")] = D.lr,
    norms: Annotated[bool, typer.Option("--norms/--no-norms", help="Train the weights of norms too.")] = D.norms,
    teacher_top_k: Annotated[int | None, typer.Option(
        help="Run the teacher first, keep its likeliest tokens on the disk, and learn from them and the sum of the rest: the "
             "teacher is not in memory beside the student.", show_default="all, run beside the student",
    )] = D.teacher_top_k,
    held_out: Annotated[int, typer.Option(help="Sequences of the text kept back to choose the best step by.")] = D.held_out,
    check_every: Annotated[int, typer.Option(help="Steps between two looks at the held-out text.")] = D.check_every,
    patience: Annotated[int, typer.Option(help="Stop after so many looks without a better one.")] = D.patience,
    checkpointing: Annotated[bool, typer.Option(
        "--checkpointing", help="Compute activations twice and keep few of them: less memory, more time.",
    )] = D.checkpointing,
    precision: Annotated[str, typer.Option(
        help="Of products: bf16, fp32, or auto (bf16 where the processor multiplies it).")] = D.precision,
    seed: Annotated[int, typer.Option(help="Seed of the order of sequences and of self-sampled text.")] = D.seed,
    device: Annotated[str, typer.Option(help="cpu, gpu, or a torch device.")] = D.device,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="physical cores")] = D.threads,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Output folder.", show_default="MODEL-healed")] = D.out,
    resume: Annotated[bool, typer.Option(
        "--resume", help="Go on after the last look at the held-out text, or the last layer.")] = D.resume,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train the scales of a quantized model so that it says what the float model says.

    No code changes: size, format and speed stay as they are. Heal on text like what the model will see, judge on other
    text. Embedding and head stay too: their blocks are made by the export.
    """
    config = HealConfig(teacher, tuple(calibration), sampled, scope, steps, batch, accumulate, seq_len, lr, norms,
                        teacher_top_k, held_out, check_every, patience, checkpointing, precision, seed, device, threads, out,
                        resume)
    if as_json:
        set_quiet(True)
    from llmc.compress.heal.run import heal as run

    result = run(model, config)
    print(json.dumps(result, indent=2) if as_json else _summary(result))


def _summary(r: dict[str, Any]) -> str:
    return f"{r['out']}: {outcome(r)}, {duration(r['seconds'])}\nnext: llmc export --format gguf {r['out']}"


def outcome(r: dict[str, Any]) -> str:
    """What healing brought, in words."""
    moved = f"scales moved {100 * r['scales_moved']:.1f} % on average"
    if "error" in r:
        return f"mean held-out layer error {100 * r['error']['before']:.2f} -> {100 * r['error']['after']:.2f} %, {moved}"
    before, after = r["kld"]["before"], r["kld"]["after"]
    return (f"held-out KLD {before:.4f} -> {after:.4f} ({after / before:.2f}x) at step {r['best_step']} of {r['steps']}, "
            f"{moved}")


def register(app: typer.Typer) -> None:
    app.command()(heal)
