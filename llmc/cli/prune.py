"""`llmc prune`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from llmc import memory
from llmc.cli.options import Json, add
from llmc.compress.prune.config import PruneConfig
from llmc.console import duration, set_quiet, size
from llmc.formats import experts
from llmc.formats.text_rows import described


def register(app: typer.Typer) -> None:
    add(app, prune, PruneConfig)


def prune(
    model: Annotated[str, typer.Argument(help="A float model: a Hugging Face folder, a .gguf file, or a hub id (org/name).")],
    config: PruneConfig, as_json: Json = False,
) -> None:
    """Make a float model sparser, shallower or narrower, and write a plain model folder of the same architecture.

    Zeros are exact, and `llmc quantize` keeps them. Embedding, head and norms are not made sparse. The loss of quality is
    measured on held-out text.
    """
    if as_json:
        set_quiet(True)
    from llmc.compress.prune.run import prune as run

    result = run(model, config)
    print(json.dumps(result, indent=2) if as_json else _plan(result) if config.dry_run else _summary(result))


def _plan(p: dict[str, Any]) -> str:
    scored = f"scored on {p['tokens']:,} tokens of {p['calibration']}, " if p["tokens"] else "no data; "
    seen = f"  {experts.described(p['experts'])}\n" if p["experts"] else ""
    notes = "".join(f"  {note}\n" for note in p["notes"])
    return (f"{p['source']} -> {p['out']}\n  {p['what']} of {p['layers']} layers, {size(p['bytes_before'])}\n{notes}"
            f"  {scored}evaluated on {p['held_out_tokens']:,} tokens of {p['calibration']}"
            f"{described(p['calibration_rows'])}\n{seen}"
            f"  {memory.described(p)} and {size(p['disk_bytes'])} of disk\n"
            f"  on {p['device']}, {p['threads']} threads, activation products in {p['matmul']}")


def _summary(r: dict[str, Any]) -> str:
    q, lines = r["quality"], [f"{r['out']}: {r['method']}, {duration(r['seconds'])}"]
    lines.append(f"  parameters  {r['parameters_before'] / 1e6:.1f} M -> {r['parameters'] / 1e6:.1f} M, "
                 f"{r['nonzero'] / 1e6:.1f} M of them not zero; {size(r['bytes_before'])} -> {size(r['bytes'])}")
    lines += [f"  {note}" for note in r["notes"]]
    if "dropped" in r:
        lines.append(f"  layers      {', '.join(map(str, r['dropped'])) or 'none'} removed, in this order")
    if r["sparsity"] > 0.001:
        shares = r["sparsity_per_layer"]
        lines.append(f"  sparsity    {100 * r['sparsity']:.2f} % of the linears, {100 * min(shares):.2f} to "
                     f"{100 * max(shares):.2f} % by layer")
    lines.append(f"  held-out    perplexity {q['base_perplexity']['value']:.2f} -> {q['perplexity']['value']:.2f}, KL "
                 f"divergence {q['kld']['value']:.3g}, top-1 agreement {100 * q['top1']['value']:.1f} %")
    if r.get("fallbacks"):
        lines.append(f"  {r['fallbacks']} layers have linears that fell back to Wanda")
    return "\n".join([*lines, r["advice"]])
