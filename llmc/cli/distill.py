"""llmc distill"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from llmc.compress.distill.config import FULL_LR, LORA_LR, DistillConfig
from llmc.console import duration, set_quiet, size

D = DistillConfig(teacher="-")


def distill(
    student: Annotated[str, typer.Argument(
        help="The float model to train: what `llmc prune` made, or any model with the teacher's tokenizer.")],
    teacher: Annotated[str, typer.Option(help="The float model to learn from: a folder, a .gguf file, or a hub id.")],
    calibration: Annotated[list[str], typer.Option(
        help="Text to learn from: a text or .jsonl file, hf:NAME, or self (sampled from the teacher). May be given again.",
        show_default="self")] = list(D.calibration),  # noqa: B006 - typer wants a list
    sampled: Annotated[int, typer.Option(
        help="Sequences of the teacher's own text mixed in with the given ones.")] = D.sampled,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = D.steps,
    batch: Annotated[int, typer.Option(help="Sequences run at once, in each process.")] = D.batch,
    accumulate: Annotated[int, typer.Option(help="Batches of a step.")] = D.accumulate,
    seq_len: Annotated[int, typer.Option(help="Tokens of a sequence.")] = D.seq_len,
    lr: Annotated[float | None, typer.Option(
        help="Learning rate (AdamW, warm-up, cosine).", show_default=f"{FULL_LR:g}, of --lora {LORA_LR:g}")] = D.lr,
    weight_decay: Annotated[float, typer.Option(help="AdamW's, of matrices.")] = D.weight_decay,
    clip: Annotated[float, typer.Option(help="Largest norm of a step's gradient.")] = D.clip,
    loss: Annotated[str, typer.Option(
        help="forward-kl (the student covers what the teacher says) or reverse-kl (it says nothing the teacher does not).",
    )] = D.loss,
    temperature: Annotated[float, typer.Option(
        help="Of both distributions; the loss is scaled by its square.")] = D.temperature,
    ce_weight: Annotated[float, typer.Option(
        help="Share of the text's own next tokens in the loss (cross-entropy), 0 to 1.")] = D.ce_weight,
    hidden_weight: Annotated[float, typer.Option(
        help="Weight of the hidden states' error, through learned projections, beside the loss.")] = D.hidden_weight,
    layer_map: Annotated[str, typer.Option(
        help="With --hidden-weight: pairs STUDENT:TEACHER of layers counted from 0 (0:0,8:9,26:29), or auto: all of the "
             "student's, evenly spread.")] = D.layer_map,
    teacher_top_k: Annotated[int | None, typer.Option(
        help="Run the teacher first, keep its likeliest tokens on the disk, and learn from them and the sum of the rest: the "
             "teacher is not in memory beside the student.", show_default="all, run beside the student",
    )] = D.teacher_top_k,
    lora: Annotated[int | None, typer.Option(
        help="Train adapters of this rank and merge them in the end (needs peft).", show_default="full weights")] = D.lora,
    held_out: Annotated[int, typer.Option(help="Sequences of the text kept back to choose the best step by.")] = D.held_out,
    check_every: Annotated[int, typer.Option(help="Steps between two looks at the held-out text.")] = D.check_every,
    patience: Annotated[int, typer.Option(help="Stop after so many looks without a better one.")] = D.patience,
    answers_only: Annotated[bool, typer.Option(
        "--answers-only", help="Learn only what assistants say in the `messages` of .jsonl files.")] = D.answers_only,
    checkpointing: Annotated[bool, typer.Option(
        "--checkpointing", help="Compute activations twice and keep few of them: less memory, more time.",
    )] = D.checkpointing,
    precision: Annotated[str, typer.Option(
        help="Of products: bf16, fp32, or auto (bf16 where the processor multiplies it).")] = D.precision,
    seed: Annotated[int, typer.Option(help="Seed of the order of sequences, of sampled text and of adapters.")] = D.seed,
    device: Annotated[str, typer.Option(help="cpu, gpu, or a torch device.")] = D.device,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="physical cores")] = D.threads,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Output folder.", show_default="STUDENT-distilled")] = D.out,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the last look at the held-out text.")] = D.resume,
    dry_run: Annotated[bool, typer.Option(
        "--dry-run", help="Show the plan with memory, disk and time, and stop.")] = D.dry_run,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train a smaller float model to say what a larger one says.

    The result has the student's shapes, types and tokenizer, and is quantized and exported like any model; zeros of a pruned
    student stay. Distil on text like what the model will see, judge on other text. On several GPUs or machines:
    accelerate launch -m llmc distill … --device gpu
    """
    config = DistillConfig(teacher, tuple(calibration), sampled, steps, batch, accumulate, seq_len, lr, weight_decay, clip,
                           loss, temperature, ce_weight, hidden_weight, layer_map, teacher_top_k, lora, held_out, check_every,
                           patience, answers_only, checkpointing, precision, seed, device, threads, out, resume, dry_run)
    if as_json:
        set_quiet(True)
    from llmc.compress.distill.run import distill as run

    if result := run(student, config):  # of several processes, the first has one
        print(json.dumps(result, indent=2) if as_json else _plan(result) if dry_run else _summary(result))


def _plan(p: dict[str, Any]) -> str:
    time = f"about {duration(p['seconds'])}" if p["seconds"] is not None else "time not estimated on this device"
    return (f"{p['source']} -> {p['out']}\n"
            f"  {p['layers'][0]} layers, {p['parameters'] / 1e6:.1f} M parameters, train {p['trained'] / 1e6:.1f} M, "
            f"learn from {p['layers'][1]} layers, {p['teacher_parameters'] / 1e6:.1f} M\n"
            f"  {p['loss']}, {p['steps']} steps, {p['tokens']:,} tokens\n"
            f"  about {size(p['memory_bytes'])} of memory, at most {size(p['disk_bytes'])} of disk, {time}\n"
            f"  on {p['device']}, {p['threads']} threads, products in {p['precision']}")


def _summary(r: dict[str, Any]) -> str:
    return f"{r['out']}: {outcome(r)}, {duration(r['seconds'])}\nnext: llmc quantize {r['out']}"


def outcome(r: dict[str, Any]) -> str:
    """What distilling brought, in words."""
    loss, ppl = r["loss"], r["perplexity"]
    kept = f", {r['zeros_kept']:,} zeros kept" if r["zeros_kept"] else ""
    return (f"held-out loss {loss['before']:.4f} -> {loss['after']:.4f}, perplexity {ppl['before']:.2f} -> "
            f"{ppl['after']:.2f} at step {r['best_step']} of {r['steps']}{kept}")


def register(app: typer.Typer) -> None:
    app.command()(distill)
