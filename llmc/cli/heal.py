"""`llmc heal`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from llmc import memory
from llmc.cli.options import Json, add
from llmc.compress.heal.config import HealConfig
from llmc.console import command, duration, set_quiet, size
from llmc.formats.text_rows import described


def register(app: typer.Typer) -> None:
    add(app, heal, HealConfig)


def heal(
    model: Annotated[str, typer.Argument(help="The folder that `llmc quantize` made.")],
    config: HealConfig, as_json: Json = False,
) -> None:
    """Train the scales of a quantized model so that its outputs match the float model's.

    Codes do not change, so size, format and speed stay the same. Train on text like the text that the model will see, and
    evaluate on other text. Embedding and head do not change: the export makes their blocks.
    """
    if as_json:
        set_quiet(True)
    from llmc.compress.heal.run import heal as run

    result = run(model, config)
    print(json.dumps(result, indent=2) if as_json else _plan(result) if config.dry_run else _summary(result))


def _plan(p: dict[str, Any]) -> str:
    texts = "".join(f"  text {spec}{described(rows)}\n" for spec, rows in p["calibration_rows"].items())
    return (f"{p['source']} -> {p['out']}\n"
            f"  {p['layers']} layers learn from {p['teacher']}, {p['scope']}, {p['steps']} steps, {p['tokens']:,} tokens\n"
            f"{texts}  {memory.described(p)} and {size(p['disk_bytes'])} of disk\n"
            f"  on {p['device']}, {p['threads']} threads, products in {p['precision']}")


def _summary(r: dict[str, Any]) -> str:
    return (f"{r['out']}: {outcome(r)}, {duration(r['seconds'])}\n"
            f"next: {command('llmc', 'export', '--format', 'gguf', r['out'])}")


def outcome(r: dict[str, Any]) -> str:
    """The effect of healing as text."""
    moved = f"scales moved {100 * r['scales_moved']:.1f} % on average"
    if "error" in r:
        return f"mean held-out layer error {100 * r['error']['before']:.2f} -> {100 * r['error']['after']:.2f} %, {moved}"
    before, after = r["kld"]["before"], r["kld"]["after"]
    return (f"held-out KLD {before:z.4f} -> {after:z.4f} ({after / before:.2f}x) at step {r['best_step']} of {r['steps']}, "
            f"{moved}")
