"""llmc transform"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from llmc.compress.transform.config import TransformConfig
from llmc.console import duration, set_quiet, size

D = TransformConfig()


def transform(
    model: Annotated[str, typer.Argument(help="A float model: a Hugging Face folder, a .gguf file, or a hub id (org/name).")],
    scaling: Annotated[str, typer.Option(
        help="Scale channels: awq (searched on calibration text), equalize (no data), smooth (SmoothQuant's, for 8-bit "
             "activations) or none.")] = D.scaling,
    alpha: Annotated[float, typer.Option(
        help="Of --scaling smoothquant: share of the activations' range that moves into the weights, 0 to 1.")] = D.alpha,
    rotate: Annotated[str, typer.Option(
        help="Rotate: r2 (values of each head), r1r2 (the residual stream too), or none.")] = D.rotate,
    untie: Annotated[bool, typer.Option("--untie", help="With r1r2: give a tied head its own matrix, and pay its bytes."),
                     ] = D.untie,
    bits: Annotated[int, typer.Option(help="Of the type to search for: 4 or 8.")] = D.bits,
    qtype: Annotated[str | None, typer.Option(help="The type to search for, as in `llmc quantize`.")] = D.type,
    fallback: Annotated[str | None, typer.Option(
        help="The type for rows that --type cannot hold.", show_default="what llama.cpp takes")] = D.fallback,
    group_size: Annotated[int, typer.Option(help="Of the type to search for: 32, 64 or 128.")] = D.group_size,
    sym: Annotated[bool, typer.Option("--sym/--asym", help="Fixed or stored zero point of the type to search for.")] = D.sym,
    calibration: Annotated[str, typer.Option(
        help="A text or .jsonl file, hf:NAME, or self: text sampled from the model.")] = D.calibration,
    samples: Annotated[int, typer.Option(help="Calibration sequences.")] = D.samples,
    seq_len: Annotated[int, typer.Option(help="Tokens of a calibration sequence.")] = D.seq_len,
    seed: Annotated[int, typer.Option(help="Seed of rotations and of --calibration self.")] = D.seed,
    device: Annotated[str, typer.Option(help="cpu, gpu, or a torch device.")] = D.device,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="physical cores")] = D.threads,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Output folder.",
                                             show_default="MODEL-ROTATION-SCALING")] = D.out,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the last finished layer.")] = D.resume,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a float model that computes the same and loses less when it is quantized.

    Nothing is added that would cost time when the model runs. Quantize the folder for the same type; evaluate against the
    original.
    """
    config = TransformConfig(scaling, rotate, untie, bits, qtype, fallback, group_size, sym, calibration, samples, seq_len, seed,
                             device, threads, out, resume, alpha)
    if as_json:
        set_quiet(True)
    from llmc.compress.transform.run import transform as run

    result = run(model, config)
    print(json.dumps(result, indent=2) if as_json else _summary(result))


def _summary(r: dict[str, Any]) -> str:
    lines = [f"{r['out']}: every layer computes the same within {r['proof']:.1g}, {duration(r['seconds'])}"]
    for p in r["passes"]:
        places = [x for layer in p["layers"] for x in layer["places"].values()]
        if before := sum(x["before"] for x in places):
            taken = sum(x["alpha"] > 0 for x in places)
            lines.append(f"  {p['name']}: {taken} of {len(places)} places scaled, rounding error "
                         f"{sum(x['after'] for x in places) / before:.3f}x")
        else:
            lines.append(f"  {p['name']}: {p['config']['rotate']}")
    if r["untied_bytes"]:
        lines.append(f"  the head is a matrix of its own now: {size(r['untied_bytes'])} more in an 8-bit file")
    smooth = any(p["config"].get("scaling") == "smoothquant" for p in r["passes"])
    after = f"export {r['out']} --format onnx --dtype w8a8" if smooth else f"quantize {r['out']}"
    return "\n".join([*lines, f"next: llmc {after}"])


def register(app: typer.Typer) -> None:
    app.command()(transform)
