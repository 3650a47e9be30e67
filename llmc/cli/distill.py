"""`llmc distill`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from llmc import memory
from llmc.cli.options import Json, add
from llmc.compress.distill.config import DistillConfig
from llmc.console import command, duration, set_quiet, size
from llmc.formats.text_rows import described


def register(app: typer.Typer) -> None:
    add(app, distill, DistillConfig)


def distill(
    student: Annotated[str, typer.Argument(help=(
        "The float model to train: a result of `llmc prune`, or any model with the teacher's tokenizer."))],
    config: DistillConfig, as_json: Json = False,
) -> None:
    """Train a smaller float model to predict what a larger one predicts.

    The result has the student's shapes, types and tokenizer. Zeros of a pruned student stay. It is quantized and exported
    like any model. Train on text like the text that the model will see, and evaluate on other text. On several GPUs or
    machines: accelerate launch -m llmc distill STUDENT --teacher MODEL --device gpu
    """
    if as_json:
        set_quiet(True)
    from llmc.compress.distill.run import distill as run

    if result := run(student, config):  # only the first of several processes has a result
        print(json.dumps(result, indent=2) if as_json else _plan(result) if config.dry_run else _summary(result))


def _plan(p: dict[str, Any]) -> str:
    time = f"about {duration(p['seconds'])}" if p["seconds"] is not None else "time not estimated on this device"
    texts = "".join(f"  text {spec}{described(rows)}\n" for spec, rows in p["calibration_rows"].items())
    return (f"{p['source']} -> {p['out']}\n"
            f"  {p['layers'][0]} layers, {p['parameters'] / 1e6:.1f} M parameters, train {p['trained'] / 1e6:.1f} M, "
            f"learn from {p['layers'][1]} layers, {p['teacher_parameters'] / 1e6:.1f} M\n"
            f"  {p['loss']}, {p['steps']} steps, {p['tokens']:,} tokens\n{texts}"
            f"  {memory.described(p)} and {size(p['disk_bytes'])} of disk, {time}\n"
            f"  on {p['device']}, {p['threads']} threads, products in {p['precision']}")


def _summary(r: dict[str, Any]) -> str:
    return f"{r['out']}: {outcome(r)}, {duration(r['seconds'])}\nnext: {command('llmc', 'quantize', r['out'])}"


def outcome(r: dict[str, Any]) -> str:
    """The effect of distillation as text."""
    loss, ppl = r["loss"], r["perplexity"]
    kept = f", {r['zeros_kept']:,} zeros kept" if r["zeros_kept"] else ""
    return (f"held-out loss {loss['before']:.4f} -> {loss['after']:.4f}, perplexity {ppl['before']:.2f} -> "
            f"{ppl['after']:.2f} at step {r['best_step']} of {r['steps']}{kept}")
