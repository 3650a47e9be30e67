"""Measure the cost of `llmc prune` before healing: zeros by three methods, layers in three orders, a narrower model.

    python benchmarks/prune.py --base BASE --calibration mixed.txt --text wiki.test.raw --work FOLDER

Expected: at 50 % zeros the log-perplexity rises with SparseGPT and with Wanda at most 0.6 times as much as with magnitude,
and with SparseGPT no more than with Wanda. 3 layers removed by measured KL lose less than 3 removed by block influence, and
both lose less than the mean of layers drawn at random (the first and the last layer may be drawn). `llmc eval` evaluates
everything in float32. Finished folders and reports in --work are used again. The script prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path
from typing import Any

import llmc
from llmc.compress.prune.methods import without
from llmc.compress.skeleton import Skeleton
from llmc.formats import model_folder
from llmc.formats.checkpoint import Checkpoint
from llmc.machine import physical_cores

MASKS = ("magnitude", "wanda", "sparsegpt")
PATTERNS = ("2:4", "4:8")


def draw(base: Path, folder: Path, drop: int, seed: int) -> None:
    """Write the base without `drop` layers, which are drawn at random."""
    skeleton = Skeleton(Checkpoint.open(base), "cpu")
    dropped = random.Random(seed).sample(range(len(skeleton.layers)), drop)
    made = without(skeleton, dropped, [])
    model_folder.write(folder, base, made.pieces, made.config, model_folder.same_bytes(made.pieces))


def measured(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Perplexity and divergence of a folder on the text, from a report that exists or is made now."""
    report = folder.with_suffix(".json")
    if not report.is_file():
        llmc.evaluate(folder, base=args.base, text=str(args.text), chunks=args.chunks, threads=args.threads, out=report)
    text = json.loads(report.read_text(encoding="utf-8"))["quality"]["texts"][0]
    return {"perplexity": text["perplexity"]["value"], "kld": text["kld"]["value"],
            "rise": math.log(text["perplexity_ratio"]["value"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--chunks", type=int, default=20)
    parser.add_argument("--drop", type=int, default=3)
    parser.add_argument("--ffn", type=float, default=0.75, help="share of the neurons that the narrower model keeps")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--only", choices=["masks", "depth"])
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    shared = {"calibration": str(args.calibration), "samples": args.samples, "threads": args.threads}
    jobs: dict[str, dict[str, Any]] = {}
    if args.only != "depth":
        jobs |= {m: {"method": m, "sparsity": 0.5} for m in MASKS}
        jobs |= {f"{m} {p}": {"method": m, "pattern": p} for p in PATTERNS for m in MASKS}
    if args.only != "masks":
        jobs |= {f"depth {by}": {"method": "depth", "drop": args.drop, "by": by} for by in ("kl", "influence")}
        jobs |= {f"depth random {seed}": {"seed": seed} for seed in range(args.seeds)}
        jobs["width"] = {"method": "width", "ffn": args.ffn}
    found = {}
    print(f"{'what':18} {'perplexity':>10} {'KLD':>7} {'log-PPL rise':>12}")
    for name, options in jobs.items():
        folder = args.work / name.replace(" ", "-").replace(":", "of")
        if not folder.is_dir():
            if "method" in options:
                llmc.prune(args.base, **options, **shared, out=folder)
            else:
                draw(args.base, folder, args.drop, options["seed"])
        found[name] = measured(folder, args)
        figures = found[name]
        print(f"{name:18} {figures['perplexity']:10.2f} {figures['kld']:7.3f} {figures['rise']:12.3f}", flush=True)
    rise = {name: f["rise"] for name, f in found.items()}
    bars = {}
    for kind in ("", *(f" {p}" for p in PATTERNS)) if args.only != "depth" else ():
        bars |= {f"{m}{kind} of magnitude": rise[m + kind] / rise["magnitude" + kind] for m in ("wanda", "sparsegpt")}
    if args.only != "masks":
        drawn = [rise[f"depth random {seed}"] for seed in range(args.seeds)]
        bars |= {"kl of random": rise["depth kl"] / (sum(drawn) / len(drawn)),
                 "influence of random": rise["depth influence"] / (sum(drawn) / len(drawn)),
                 "kl of influence": rise["depth kl"] / rise["depth influence"]}
    print("\n".join(f"{name}: {value:.2f}" for name, value in bars.items()))
    print(json.dumps({"figures": found, "bars": bars}))


if __name__ == "__main__":
    main()
