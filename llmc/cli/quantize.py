"""llmc quantize"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from llmc.cli.heal import outcome
from llmc.compress.quantize.config import QuantizeConfig, budget_lines
from llmc.console import duration, set_quiet, size

D = QuantizeConfig()


def quantize(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder, a .gguf file, or a hub id (org/name).")],
    bits: Annotated[int, typer.Option(help="4 or 8.")] = D.bits,
    qtype: Annotated[str | None, typer.Option(
        help="Any GGUF weight type instead of --bits: q2_k … q6_k, q4_0, q4_1, q5_0, q5_1, q8_0, iq4_nl, iq4_xs.")] = D.type,
    fallback: Annotated[str | None, typer.Option(
        help="The type for rows that --type cannot hold (types in blocks of 256).",
        show_default="iq4_nl, q5_0, q5_1 or q8_0")] = D.fallback,
    preset: Annotated[str | None, typer.Option(
        help="llama.cpp's mix of types by tensor: q2_k, q2_k_s, q3_k_s, q3_k_m, q3_k_l, q4_k_s, q4_k_m, q5_k_s, q5_k_m, "
             "q6_k, q4_0, …, iq4_nl, iq4_xs. Embedding and head take theirs at the export.")] = D.preset,
    target_size: Annotated[str | None, typer.Option(
        help="A type for each tensor, by measured sensitivity, so that the .gguf file is at most this large: 90MB, 1.2GB, "
             "or as:q4_k_m (any preset): no larger than that preset's file.")] = D.target_size,
    target_bpw: Annotated[float | None, typer.Option(
        help="The same to bits per weight over all of the file's tensors: 4.25.")] = D.target_bpw,
    target_kld: Annotated[float | None, typer.Option(
        help="The same to the smallest file whose predicted KL divergence is at most this: 0.05.")] = D.target_kld,
    method: Annotated[str, typer.Option(help="gptq (error-compensated, needs text) or rtn (no data).")] = D.method,
    imatrix: Annotated[Path | None, typer.Option(
        help="With rtn: an importance matrix of llmc or llama.cpp (.gguf) that says what each column counts.",
        show_default="none")] = D.imatrix,
    group_size: Annotated[int, typer.Option(help="Weights that share a scale: 32, 64 or 128.")] = D.group_size,
    sym: Annotated[bool, typer.Option("--sym/--asym", help="Fixed or stored zero point. Only --sym fits Q4_0 and Q8_0."),
                   ] = D.sym,
    calibration: Annotated[str, typer.Option(
        help="A text or .jsonl file, hf:NAME, or self: text sampled from the model.")] = D.calibration,
    samples: Annotated[int, typer.Option(help="Calibration sequences.")] = D.samples,
    seq_len: Annotated[int, typer.Option(help="Tokens of a calibration sequence.")] = D.seq_len,
    seed: Annotated[int, typer.Option(help="Seed of --calibration self.")] = D.seed,
    damp: Annotated[float, typer.Option(help="Added to the Hessian's diagonal, as a share of its mean.")] = D.damp,
    true_sequential: Annotated[bool, typer.Option(
        "--true-sequential/--one-pass", help="Calibrate each linear on the quantized ones before it, or all at once."),
    ] = D.true_sequential,
    transform: Annotated[str, typer.Option(
        help="Change the float model first, its function kept: scaling (scale channels), rotate (where that costs no byte), "
             "rotate+scaling, auto (what measures best on held-out calibration text), none.")] = D.transform,
    heal: Annotated[int, typer.Option(
        help="Then heal for so many steps against MODEL, as `llmc heal` does on the same text (160 is its default); 0: no.",
    )] = D.heal,
    lose_zeros: Annotated[bool, typer.Option(
        "--lose-zeros", help="Let a type or transform that cannot keep the zeros of a pruned model lose them."),
    ] = D.lose_zeros,
    device: Annotated[str, typer.Option(help="cpu, gpu, or a torch device.")] = D.device,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="physical cores")] = D.threads,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Output folder.",
                                             show_default="MODEL-METHOD-WHAT")] = D.out,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the last finished layer.")] = D.resume,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and what it needs; do nothing.")] = D.dry_run,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Quantize a model's linears and write a GPTQ checkpoint folder, or with --type or --preset one of GGUF weight types.

    The type is that of the file that will ship: `llmc export --format gguf` then keeps every code bit for bit.
    """
    config = QuantizeConfig(bits, qtype, fallback, preset, target_size, target_bpw, target_kld, method, imatrix, group_size,
                            sym, calibration, samples, seq_len, seed, damp, true_sequential, device, threads, out, resume,
                            dry_run, transform, heal, lose_zeros)
    if as_json:
        set_quiet(True)
    from llmc.compress.quantize.run import quantize as run

    result = run(model, config)
    print(json.dumps(result, indent=2) if as_json else _plan(result) if dry_run else _summary(result))


def _plan(p: dict[str, Any]) -> str:
    first = "" if p["transform"] == "none" else f"transform {p['transform']}, then "
    text = f"calibrated on {p['tokens']:,} tokens of {p['calibration']}" if p["calibration"] else "no data"
    if m := p["imatrix"]:
        text = f"weighted by {m['name']} ({m['chunk_count']} chunks of {', '.join(m['datasets']) or 'unnamed text'})"
    budget = budget_lines(p["plan"], p["types"], p["tables"]) + "\n" if "plan" in p else ""
    then = f", then healed for {p['heal']} steps" if p["heal"] else ""
    return (f"{p['source']} -> {p['out']}\n{budget}"
            f"  {first}{p['method']} on {'these types' if budget else _types(p)}, {text}{then}\n"
            f"  {p['layers']} layers, {p['linear_weights'] / 1e6:.1f} M weights, {size(p['out_bytes'])} when done\n"
            f"  at most about {size(p['memory_bytes'])} of memory and {size(p['disk_bytes'])} of disk\n"
            f"  on {p['device']}, {p['threads']} threads, activation products in {p['matmul']}")


def _types(r: dict[str, Any]) -> str:
    """'q4_k', or 'q4_k_m (24 q4_k, 6 q6_k; embedding q6_k)'."""
    counts = ", ".join(f"{n} {qtype}" for qtype, n in r["types"].items())
    tables = "".join(f"; {table} {qtype}" for table, qtype in r["tables"].items())
    return str(r["type"]) + (f" ({counts}{tables})" if len(r["types"]) > 1 or tables else "")


def _summary(r: dict[str, Any]) -> str:
    departures = f", {r['fallbacks']} layers fell back to RTN" if r["fallbacks"] else ""
    taken = f"transform {r['transform']['taken']}: {r['transform']['why']}\n" if r["transform"] else ""
    healed = f"healed: {outcome(r['healed'])}\n" if "healed" in r else ""
    return (f"{taken}{healed}{r['out']}: {_types(r)}, {r['bits_per_weight']:.3g} bits per linear weight, {size(r['bytes'])}, "
            f"mean layer error {100 * r['error']:.2f} %{departures}, {duration(r['seconds'])}\n"
            f"next: llmc export --format gguf {r['out']}")


def register(app: typer.Typer) -> None:
    app.command()(quantize)
