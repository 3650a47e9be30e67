"""llmc prune"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from llmc.compress.prune.config import PruneConfig
from llmc.console import duration, set_quiet, size

D = PruneConfig()


def prune(
    model: Annotated[str, typer.Argument(help="A float model: a Hugging Face folder, a .gguf file, or a hub id (org/name).")],
    method: Annotated[str, typer.Option(
        help="Zero weights: sparsegpt (what is left makes up for them), wanda (by weight and input), magnitude (no data). "
             "Smaller shapes: depth (whole layers), width (neurons, heads, channels).")] = D.method,
    sparsity: Annotated[float | None, typer.Option(
        help="Share of the linears' weights that become zero, the same in every linear.", show_default="0.5")] = D.sparsity,
    pattern: Annotated[str | None, typer.Option(
        help="2:4 or 4:8: so many zeros in each run of weights of a row.", show_default="none")] = D.pattern,
    drop: Annotated[int | None, typer.Option(help="Of depth: how many layers go.", show_default="none")] = D.drop,
    by: Annotated[str, typer.Option(
        help="Of depth: kl (the layer whose absence is measured to cost least goes, one at a time; the whole model in "
             "memory) or influence (those that turn their input least).")] = D.by,
    ffn: Annotated[float, typer.Option(
        help="Of width: share of the feed-forward neurons that stays, to a multiple of 256 where one is near, else of 32.",
    )] = D.ffn,
    heads: Annotated[float, typer.Option(
        help="Of width: share of the attention heads that stays, in whole key-value groups.")] = D.heads,
    hidden: Annotated[float, typer.Option(
        help="Of width: share of the residual stream's channels that stays, to a multiple of 256 or 32.")] = D.hidden,
    calibration: Annotated[str, typer.Option(
        help="A text or .jsonl file, hf:NAME, or self: text sampled from the model.")] = D.calibration,
    samples: Annotated[int, typer.Option(
        help="Sequences of text; an eighth of them, at most 16, only judges the result.")] = D.samples,
    seq_len: Annotated[int, typer.Option(help="Tokens of a sequence.")] = D.seq_len,
    seed: Annotated[int, typer.Option(help="Seed of --calibration self.")] = D.seed,
    damp: Annotated[float, typer.Option(
        help="Of sparsegpt: added to the Hessian's diagonal, as a share of its mean.")] = D.damp,
    device: Annotated[str, typer.Option(help="cpu, gpu, or a torch device.")] = D.device,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="physical cores")] = D.threads,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Output folder.",
                                             show_default="MODEL-METHOD-SHARE")] = D.out,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the last finished layer.")] = D.resume,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and what it needs; do nothing.")] = D.dry_run,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Make a float model sparser, shallower or narrower: a plain model folder of the same architecture.

    Zeros are exact and `llmc quantize` keeps them. Embedding, head and norms are not made sparse. What was lost is measured
    on text that pruning did not look at.
    """
    config = PruneConfig(method, sparsity, pattern, drop, by, ffn, heads, hidden, calibration, samples, seq_len, seed, damp,
                         device, threads, out, resume, dry_run)
    if as_json:
        set_quiet(True)
    from llmc.compress.prune.run import prune as run

    result = run(model, config)
    print(json.dumps(result, indent=2) if as_json else _plan(result) if dry_run else _summary(result))


def _plan(p: dict[str, Any]) -> str:
    looked = f"looking at {p['tokens']:,} tokens of {p['calibration']}, " if p["tokens"] else "no data; "
    notes = "".join(f"  {note}\n" for note in p["notes"])
    whole = " (the whole model)" if p["whole_model_in_memory"] else ""
    return (f"{p['source']} -> {p['out']}\n  {p['what']} of {p['layers']} layers, {size(p['bytes_before'])}\n{notes}"
            f"  {looked}judged by {p['held_out_tokens']:,} tokens of {p['calibration']}\n"
            f"  at most about {size(p['memory_bytes'])} of memory{whole} and {size(p['disk_bytes'])} of disk\n"
            f"  on {p['device']}, {p['threads']} threads, activation products in {p['matmul']}")


def _summary(r: dict[str, Any]) -> str:
    q, lines = r["quality"], [f"{r['out']}: {r['method']}, {duration(r['seconds'])}"]
    lines.append(f"  parameters  {r['parameters_before'] / 1e6:.1f} M -> {r['parameters'] / 1e6:.1f} M, "
                 f"{r['nonzero'] / 1e6:.1f} M of them not zero; {size(r['bytes_before'])} -> {size(r['bytes'])}")
    lines += [f"  {note}" for note in r["notes"]]
    if "dropped" in r:
        lines.append(f"  layers      {', '.join(map(str, r['dropped'])) or 'none'} went, in this order")
    if r["sparsity"] > 0.001:
        shares = r["sparsity_per_layer"]
        lines.append(f"  sparsity    {100 * r['sparsity']:.2f} % of the linears, {100 * min(shares):.2f} to "
                     f"{100 * max(shares):.2f} % by layer")
    lines.append(f"  held-out    perplexity {q['base_perplexity']['value']:.2f} -> {q['perplexity']['value']:.2f}, KL "
                 f"divergence {q['kld']['value']:.3g}, top-1 agreement {100 * q['top1']['value']:.1f} %")
    if r.get("fallbacks"):
        lines.append(f"  {r['fallbacks']} layers have linears that fell back to Wanda")
    return "\n".join([*lines, r["advice"]])


def register(app: typer.Typer) -> None:
    app.command()(prune)
