"""`llmc quantize`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from llmc import memory
from llmc.cli.heal import outcome
from llmc.cli.options import Json, add
from llmc.compress.quantize.config import QuantizeConfig, budget_lines, carried_lines
from llmc.console import command, duration, set_quiet, size
from llmc.formats import experts
from llmc.formats.text_rows import described


def register(app: typer.Typer) -> None:
    add(app, quantize, QuantizeConfig)


def quantize(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder, a .gguf file, or a hub id (org/name).")],
    config: QuantizeConfig, as_json: Json = False,
) -> None:
    """Quantize the linears of a model and write a model folder.

    The folder holds a GPTQ checkpoint, or GGUF weight types with --type, --preset or a target. `llmc export --format gguf`
    keeps every code bit for bit.
    """
    if as_json:
        set_quiet(True)
    from llmc.compress.quantize.run import quantize as run

    result = run(model, config)
    print(json.dumps(result, indent=2) if as_json else _plan(result) if config.dry_run else _summary(result))


def _plan(p: dict[str, Any]) -> str:
    first = "" if p["transform"] == "none" else f"transform {p['transform']}, then "
    text = (f"calibrated on {p['tokens']:,} tokens of {p['calibration']}{described(p['calibration_rows'])}"
            if p["calibration"] else "no data")
    if p["tokens_per_column"]:
        width, share = max(p["tokens_per_column"].items())
        text += f" ({share:.1f} per column of the widest matrix, {width})"
    if m := p["imatrix"]:
        text = f"weighted by {m['name']} ({m['chunk_count']} chunks of {', '.join(m['datasets']) or 'unnamed text'})"
    seen = f"  {experts.described(p['experts'])}\n" if p["experts"] else ""
    budget = budget_lines(p["plan"], p["types"], p["end_types"]) + "\n" if "plan" in p else ""
    notes = "".join(f"  {note}\n" for note in (*p["notes"], *filter(None, [_better(p).strip()])))
    then = f", then healed for {p['heal']} steps" if p["heal"] else ""
    return (f"{p['source']} -> {p['out']}\n{budget}"
            f"  {first}{p['method']} on {'these types' if budget else _types(p)}, {text}{then}\n"
            f"  {p['layers']} layers, {p['linear_weights'] / 1e6:.1f} M weights, {p['bits_per_weight']:.3g} bits per weight "
            f"of the layers' matrices, {size(p['out_bytes'])} when done ({size(p['token_bytes'])} read per token)\n"
            f"{seen}{_floats(p)}{notes}  {memory.described(p)} and {size(p['disk_bytes'])} of disk\n"
            f"  on {p['device']}, {p['threads']} threads, activation products in {p['matmul']}")


def _floats(r: dict[str, Any]) -> str:
    """The matrices that stay floats, one line for each rule; nothing for biases and norms."""
    kept = {why: k for why, k in r["floats"].items() if why not in ("biases", "norms and other vectors")}
    return "".join(f"  stay floats: {k['tensors']} {why} ({k['weights'] / 1e6:.3g} M weights): {', '.join(k['names'])}\n"
                   for why, k in kept.items())


def _types(r: dict[str, Any]) -> str:
    """'q4_k', or 'q4_k_m (24 q4_k, 6 q6_k; embedding q6_k)'."""
    counts = ", ".join(f"{n} {qtype}" for qtype, n in r["types"].items())
    ends = "".join(f"; {end} {qtype}" for end, qtype in r["end_types"].items())
    return str(r["type"]) + (f" ({counts}{ends})" if len(r["types"]) > 1 or ends else "")


def _summary(r: dict[str, Any]) -> str:
    fallbacks = f", {r['fallbacks']} layers fell back to RTN" if r["fallbacks"] else ""
    taken = f"transform {r['transform']['taken']}: {r['transform']['why']}\n" if r["transform"] else ""
    healed = f"healed: {outcome(r['healed'])}\n" if "healed" in r else ""
    return (f"{taken}{healed}{carried_lines(r['carried'])}"
            f"{r['out']}: {_types(r)}, {r['bits_per_weight']:.3g} bits per weight, {size(r['bytes'])}, "
            f"mean layer error {100 * r['error']:.2f} %{fallbacks}, {duration(r['seconds'])}\n{_floats(r)}"
            f"{_better(r)}next: {command('llmc', 'export', '--format', 'gguf', r['out'])}")


def _better(r: dict[str, Any]) -> str:
    """What loses less in as many bytes of a GGUF file, for a model that need not fit other formats."""
    return ("for llama.cpp alone, --type iq4_nl loses less in as many bytes; --goal gguf chooses the types of a file of "
            "Q4_K_M's size\n" if str(r["type"]).startswith("int4-sym") else "")
