"""llmc imatrix"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from llmc.compress.imatrix.config import ImatrixConfig
from llmc.console import duration, set_quiet

D = ImatrixConfig()


def imatrix(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder, a .gguf file, or a hub id (org/name).")],
    calibration: Annotated[str, typer.Option(
        help="A text or .jsonl file, hf:NAME, or self: text sampled from the model.")] = D.calibration,
    samples: Annotated[int, typer.Option(help="Calibration sequences (llama.cpp calls them chunks).")] = D.samples,
    seq_len: Annotated[int, typer.Option(help="Tokens of a calibration sequence.")] = D.seq_len,
    seed: Annotated[int, typer.Option(help="Seed of --calibration self.")] = D.seed,
    device: Annotated[str, typer.Option(help="cpu, gpu, or a torch device.")] = D.device,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="physical cores")] = D.threads,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="The file to write.",
                                             show_default="MODEL-imatrix.gguf")] = D.out,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the last finished layer.")] = D.resume,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write an importance matrix for llama.cpp's llama-quantize, in its own GGUF form.

    For every linear it holds the mean square of each input column on the calibration text. The model runs once, layer by
    layer in bounded memory. `llmc quantize --method rtn --imatrix` reads it too.
    """
    config = ImatrixConfig(calibration, samples, seq_len, seed, device, threads, out, resume)
    if as_json:
        set_quiet(True)
    from llmc.compress.imatrix.run import imatrix as run

    result = run(model, config)
    print(json.dumps(result, indent=2) if as_json else _summary(result))


def _summary(r: dict[str, Any]) -> str:
    return (f"{r['out']}: {r['matrices']} matrices of {r['layers']} layers, {r['tokens']:,} tokens of {r['calibration']}, "
            f"{duration(r['seconds'])}\n"
            f"next: llama-quantize --imatrix {r['out']} MODEL-F16.gguf SMALL.gguf Q4_K_M")


def register(app: typer.Typer) -> None:
    app.command()(imatrix)
