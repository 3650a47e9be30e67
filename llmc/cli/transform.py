"""`llmc transform`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from llmc import memory
from llmc.cli.options import Json, add
from llmc.compress.transform.config import TransformConfig
from llmc.console import command, duration, set_quiet, size
from llmc.formats.text_rows import described


def register(app: typer.Typer) -> None:
    add(app, transform, TransformConfig)


def transform(
    model: Annotated[str, typer.Argument(help="A float model: a Hugging Face folder, a .gguf file, or a hub id (org/name).")],
    config: TransformConfig, as_json: Json = False,
) -> None:
    """Write a float model that computes the same and is easier to quantize.

    The model runs at the same speed. Quantize the folder with the same type. Evaluate the result against the original model.
    """
    if as_json:
        set_quiet(True)
    from llmc.compress.transform.run import transform as run

    result = run(model, config)
    print(json.dumps(result, indent=2) if as_json else _plan(result) if config.dry_run else _summary(result))


def _plan(p: dict[str, Any]) -> str:
    rows = described(p["calibration_rows"])
    text = f"{p['tokens']:,} tokens of {p['calibration']}{rows}" if p["calibration"] else "no data"
    return (f"{p['source']} -> {p['out']}\n"
            f"  scaling {p['scaling']}, rotation {p['rotate']} of {p['layers']} layers, {text}\n"
            f"  {memory.described(p)} and {size(p['disk_bytes'])} of disk\n"
            f"  on {p['device']}, {p['threads']} threads, activation products in {p['matmul']}")


def _summary(r: dict[str, Any]) -> str:
    lines = [f"{r['out']}: every layer gives the same output within {r['proof']:.1g}, {duration(r['seconds'])}"]
    for p in r["passes"]:
        places = [x for layer in p["layers"] for x in layer["places"].values()]
        if before := sum(x["before"] for x in places):
            taken = sum(x["alpha"] > 0 for x in places)
            lines.append(f"  {p['name']}: {taken} of {len(places)} places scaled, rounding error "
                         f"{sum(x['after'] for x in places) / before:.3f}x")
        else:
            lines.append(f"  {p['name']}: {p['config']['rotate']}")
    if r["untied_bytes"]:
        lines.append(f"  the head is now a separate matrix: {size(r['untied_bytes'])} more in an 8-bit file")
    smooth = any(p["config"].get("scaling") == "smoothquant" for p in r["passes"])
    after = ("export", r["out"], "--format", "onnx", "--dtype", "w8a8") if smooth else ("quantize", r["out"])
    return "\n".join([*lines, f"next: {command('llmc', *after)}"])
