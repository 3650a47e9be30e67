"""How much of the log-perplexity that dropping layers costs does `llmc distill` bring back, on text it was not trained on?

The student is what `llmc prune --method depth --drop N` makes of the base, or the folder `--student`. All three models are
judged by `llmc eval` in torch. Prints the held-out curve, a table and one JSON line; exit code 1 where less than `--least`
comes back on the first text or the distillation takes longer than `--minutes`. What is in the folder `--work` already is not
made again. Options after `--` go to `llmc distill`.

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
    """The last pass of the distilled folder, with the seconds it took where it is made now."""
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
    """Of every text, nats a token."""
    reports = [llmc.evaluate(model, text=text, chunks=args.chunks, threads=args.threads) for text in args.text]
    return [math.log(r["quality"]["texts"][0]["perplexity"]["value"]) for r in reports]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--drop", type=int, default=3, help="how many layers the student lacks")
    parser.add_argument("--student", type=Path, help="a pruned folder instead of --drop")
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--least", type=float, default=0.5, help="share of the lost log-perplexity that must come back")
    parser.add_argument("--minutes", type=float, default=20, help="that the distillation may take")
    parser.add_argument("options", nargs="*", help="of llmc distill, after --")
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
