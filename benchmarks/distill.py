"""Measure how much of the log-perplexity lost by removed layers `llmc distill` recovers, on text it was not trained on.

The student is the base after `llmc prune --method depth --drop N`, or the folder `--student`. `llmc eval` evaluates all three
models in torch. The script prints the held-out curve, a table and one JSON line. Exit code 1 if less than `--least` is
recovered on the first text, or if the distillation takes longer than `--minutes`. Folders that are already in `--work` are
not made again. Options after `--` are given to `llmc distill`.

    python benchmarks/distill.py --base BASE --calibration mixed.txt --text wiki.test.raw --text tinystories.txt \
        --work /some/empty/folder [--drop 3 | --student FOLDER] [-- --steps 300 --lr 1e-4]
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import llmc
from llmc.evals.report.show import table
from llmc.machine import physical_cores


def distilled(student: Path, args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """The last pass in the manifest of the distilled folder, and the seconds that it took if it is made now."""
    seconds = None
    if not out.exists():
        start = time.monotonic()
        command = [sys.executable, "-m", "llmc", "distill", student, "--teacher", args.base,
                   "--calibration", args.calibration, "--threads", args.threads, "-o", out, *args.options]
        subprocess.run([str(c) for c in command], check=True, stdout=subprocess.DEVNULL)
        seconds = round(time.monotonic() - start, 1)
    last: dict[str, Any] = json.loads((out / "llmc.json").read_text(encoding="utf-8"))["passes"][-1]
    return {**last, "seconds": seconds}


def log_perplexities(model: Path, args: argparse.Namespace) -> list[float]:
    """The log-perplexity on every text, in nats per token."""
    reports = [llmc.evaluate(model, text=text, chunks=args.chunks, threads=args.threads) for text in args.text]
    return [math.log(r["quality"]["texts"][0]["perplexity"]["value"]) for r in reports]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--drop", type=int, default=3, help="number of layers to remove for the student")
    parser.add_argument("--student", type=Path, help="a pruned folder instead of --drop")
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--least", type=float, default=0.5, help="share of the lost log-perplexity that must be recovered")
    parser.add_argument("--minutes", type=float, default=20, help="longest time of the distillation")
    parser.add_argument("options", nargs="*", help="options of llmc distill, after --")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    student = args.student or args.work / "student"
    if not student.exists():
        llmc.prune(args.base, method="depth", drop=args.drop, calibration=args.calibration, threads=args.threads, out=student)
    made = distilled(student, args, args.work / "distilled")
    for row in made["curve"]:
        print(f"step {row['step']:>5}  held-out loss {row['loss']:.4f}  perplexity {row['perplexity']:.2f}")
    nats = {name: log_perplexities(folder, args) for name, folder in
            (("base", args.base), ("student", student), ("distilled", args.work / "distilled"))}
    recovered = [(s - d) / (s - b) for b, s, d in zip(*nats.values(), strict=True)]
    texts = [Path(t).name for t in args.text]
    print(table([["", *(f"{t}: PPL, ln PPL" for t in texts)],
                 *([name, *(f"{math.exp(n):.2f}  {n:.4f}" for n in found)] for name, found in nats.items()),
                 ["recovered", *(f"{100 * r:.1f} %" for r in recovered)]]), flush=True)
    print(json.dumps({"texts": texts, "log_perplexity": nats, "recovered": recovered, "seconds": made["seconds"],
                      "steps": made["steps"], "best_step": made["best_step"], "config": made["config"]}))
    in_time = made["seconds"] is None or made["seconds"] <= 60 * args.minutes
    sys.exit(0 if recovered[0] >= args.least and in_time else 1)


if __name__ == "__main__":
    main()
