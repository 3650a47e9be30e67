"""`llmc imatrix`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from llmc import memory
from llmc.cli.options import Json, add
from llmc.compress.imatrix.config import ImatrixConfig
from llmc.console import command, duration, set_quiet, size
from llmc.formats import experts
from llmc.formats.text_rows import described


def register(app: typer.Typer) -> None:
    add(app, imatrix, ImatrixConfig)


def imatrix(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder, a .gguf file, or a hub id (org/name).")],
    config: ImatrixConfig, as_json: Json = False,
) -> None:
    """Write an importance matrix in the GGUF form of llama.cpp's llama-quantize.

    For every linear it holds the mean square of each input column on the calibration text. The model runs once, layer by
    layer, in bounded memory. `llmc quantize --method rtn --imatrix` reads the file too.
    """
    if as_json:
        set_quiet(True)
    from llmc.compress.imatrix.run import imatrix as run

    result = run(model, config)
    print(json.dumps(result, indent=2) if as_json else _plan(result) if config.dry_run else _summary(result))


def _plan(p: dict[str, Any]) -> str:
    seen = f"  {experts.described(p['experts'])}\n" if p["experts"] else ""
    return (f"{p['source']} -> {p['out']}\n"
            f"  {p['matrices']} matrices of {p['layers']} layers, {p['tokens']:,} tokens of {p['calibration']}"
            f"{described(p['calibration_rows'])}\n{seen}"
            f"  {memory.described(p)} and {size(p['disk_bytes'])} of disk\n"
            f"  on {p['device']}, {p['threads']} threads, activation products in {p['matmul']}")


def _summary(r: dict[str, Any]) -> str:
    return (f"{r['out']}: {r['matrices']} matrices of {r['layers']} layers, {r['tokens']:,} tokens of {r['calibration']}, "
            f"{duration(r['seconds'])}\n"
            f"next: {command('llama-quantize', '--imatrix', r['out'], 'MODEL-F16.gguf', 'SMALL.gguf', 'Q4_K_M')}")
