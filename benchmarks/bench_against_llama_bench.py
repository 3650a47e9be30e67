"""Check that `llmc bench` measures the same speeds as llama.cpp's llama-bench and onnxruntime-genai's benchmark.

The two tools take turns on the same file with the same number of threads, prompt, depth and tokens. llama-bench's `pp`
is llmc's prefill, its `tg` is llmc's decoding. For an ONNX folder the other tool is onnxruntime-genai's generator, used
as in its benchmark (its package on PyPI has no script): a prompt is `append_tokens` and the first token, decoding is
`generate_next_token`. A round is one bench of each tool. The result is the median over the rounds of llmc's speed divided
by the other's. The script prints a table and one JSON line. Exit code 1 if a ratio is further from 1 than `--within`.

llama-bench must have the same kernels as llama-cpp-python. The surest way is to link it with that package's libraries
(`-L .../llama_cpp/lib -lllama -lggml -lggml-base`, with the llama.cpp sources that the package was built from).

    python benchmarks/bench_against_llama_bench.py --llama-bench BIN/llama-bench small.gguf onnx-folder [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from llmc.evals.bench.config import BenchConfig
from llmc.evals.bench.prompt import prompt_ids
from llmc.evals.bench.run import bench
from llmc.evals.report.sections import speeds_of
from llmc.evals.report.show import table
from llmc.formats.artifacts.table import artifact_at
from llmc.machine import physical_cores
from llmc.runtimes.amx import use_extra_buffers


def ours(artifact: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run `llmc bench`. Returns tokens/s of prefill and of decoding, and whether the bench is marked unstable."""
    config = BenchConfig((str(artifact),), prompt=(args.prompt,), depth=(args.depth,), generate=args.generate,
                         threads=args.threads)
    s = speeds_of(bench(config)[0])["local-cpu"]
    return {"prefill": s["prefill"]["median"], "decode": s["decode"]["median"], "unstable": s["unstable"]}


def llama_bench(artifact: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The medians of llama-bench's own repetitions. It makes a new context for each test; llmc fills its context anew."""
    command = [args.llama_bench, "-m", artifact, "-p", args.prompt, "-n", args.generate, "-t", args.threads, "-ngl", 0,
               "-r", args.repetitions, "-o", "json", "--repack", int(args.repack)]
    found = {}
    for what, depth, prompt, generate in (("prefill", 0, args.prompt, 0), ("decode", args.depth, 0, args.generate)):
        own = [*command, "-d", depth]
        own[own.index("-p") + 1], own[own.index("-n") + 1] = prompt, generate
        done = subprocess.run([str(c) for c in own], capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"llama-bench failed ({done.returncode}):\n{done.stderr[-2000:]}")
        (test,) = json.loads(done.stdout)
        found[what] = float(np.median(test["samples_ts"]))
    return found


def genai(artifact: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run onnxruntime-genai's generator in this process, greedy, with the same threads for its session as llmc."""
    import onnxruntime_genai as og

    config = og.Config(str(artifact))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": args.threads}}}}))
    model = og.Model(config)
    ids = np.array(prompt_ids(artifact, max(args.prompt, args.depth)), np.int32)
    first, decode = [], []
    for _ in range(2 + args.repetitions):
        for length, seconds in ((args.prompt, first), (args.depth, decode)):
            params = og.GeneratorParams(model)
            total = length + args.generate + 1
            params.set_search_options(do_sample=False, max_length=total, min_length=total)
            generator = og.Generator(model, params)
            start = time.perf_counter()
            generator.append_tokens(ids[None, :length])
            generator.generate_next_token()
            if seconds is first:
                first.append(time.perf_counter() - start)
                continue
            start = time.perf_counter()
            for _ in range(args.generate):
                generator.generate_next_token()
            decode.append(time.perf_counter() - start)
    return {"prefill": args.prompt / float(np.median(first[2:])), "decode": args.generate / float(np.median(decode[2:]))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="+", type=Path, help=".gguf files and ONNX folders")
    parser.add_argument("--llama-bench", type=Path, help="needed for .gguf files")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--depth", type=int, default=128, help="tokens in the cache when decoding begins, at least 1")
    parser.add_argument("--generate", type=int, default=64)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--repetitions", type=int, default=7, help="number of repetitions of the other tool")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--within", type=float, default=0.03)
    args = parser.parse_args()
    args.repack = use_extra_buffers()  # a build whose AMX kernels crash runs neither tool with repacked weights
    rows, figures = [["artifact", "what", "llmc", "theirs", "llmc / theirs", "verdict"]], {}
    for artifact in args.artifacts:
        theirs = llama_bench if artifact_at(artifact).format == "gguf" else genai
        if theirs is llama_bench and args.llama_bench is None:
            parser.error(f"--llama-bench is needed for {artifact}")
        rounds = [(ours(artifact, args), theirs(artifact, args)) for _ in range(args.rounds)]
        unstable = sum(bool(mine["unstable"]) for mine, _ in rounds)
        for what in ("prefill", "decode"):
            ratio = float(np.median([mine[what] / other[what] for mine, other in rounds]))
            mine, other = (float(np.median([r[i][what] for r in rounds])) for i in (0, 1))
            verdict = ("within" if abs(ratio - 1) <= args.within else "OUTSIDE") + f" {args.within:.0%}"
            rows.append([artifact.name, what, f"{mine:.2f}", f"{other:.2f}", f"{ratio:.4f}",
                         verdict + (f", {unstable} of {args.rounds} benches unstable" if unstable else "")])
            figures[f"{artifact.name} {what}"] = {"llmc": mine, "theirs": other, "ratio": ratio, "unstable": unstable}
    print(table(rows))
    asked = {k: getattr(args, k) for k in ("prompt", "depth", "generate", "threads", "rounds")}
    print(json.dumps({**asked, "figures": figures}))
    sys.exit(0 if all(abs(f["ratio"] - 1) <= args.within for f in figures.values()) else 1)


if __name__ == "__main__":
    main()
