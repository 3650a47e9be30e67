"""Check that `llmc eval` agrees with llama.cpp's own `llama-perplexity --kl-divergence` on the same file and text.

llama-perplexity tokenizes the text itself and takes its base logits from a GGUF (its logits file has 16 bits for each).
llmc gives both models the ids of the Hugging Face tokenizer and takes the base's logits from torch in float32. Perplexity
must agree within 0.2 %, mean KL divergence within 3 %. The script prints a table and one JSON line. Exit code 1 if they
disagree.

    python benchmarks/agree_with_llama_perplexity.py --llama-perplexity build/bin/llama-perplexity \
        --base MODEL_FOLDER --base-gguf base-f16.gguf --candidate small.gguf --text wiki.test.raw --chunks 10
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from llmc.evals.quality.config import EvalConfig
from llmc.evals.quality.run import evaluate
from llmc.evals.report.show import table
from llmc.machine import physical_cores
from llmc.runtimes.amx import use_extra_buffers

TOLERANCE = {"perplexity": 0.002, "kld": 0.03}
LINES = {  # what llama-perplexity prints: value ± standard error over tokens
    "perplexity": r"Mean PPL\(Q\)\s*:\s*([\d.]+) ±\s*([\d.]+)",
    "base_perplexity": r"Mean PPL\(base\)\s*:\s*([\d.]+) ±\s*([\d.]+)",
    "kld": r"Mean\s+KLD:\s*([\d.]+) ±\s*([\d.]+)",
    "top1": r"Same top p:\s*([\d.]+) ±\s*([\d.]+) %",
}


def run_theirs(args: argparse.Namespace, logits: Path) -> dict[str, tuple[float, float]]:
    """The figures of llama-perplexity: {name: (value, standard error over tokens)}."""
    common = [args.llama_perplexity, "-f", args.text, "-c", str(args.context), "--chunks", str(args.chunks),
              "-t", str(args.threads), "--kl-divergence-base", str(logits)]
    if not use_extra_buffers():
        common.append("--no-repack")  # a build with broken AMX kernels crashes without it
    subprocess.run([*common, "-m", args.base_gguf], check=True, capture_output=True)
    done = subprocess.run([*common, "-m", args.candidate, "--kl-divergence"], check=True, capture_output=True, text=True)
    found = {}
    for name, pattern in LINES.items():
        match = re.search(pattern, done.stdout + done.stderr)
        if not match:
            sys.exit(f"llama-perplexity printed no line like {pattern!r}:\n{done.stdout[-2000:]}")
        scale = 100 if name == "top1" else 1
        found[name] = (float(match[1]) / scale, float(match[2]) / scale)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("llama-perplexity", "base", "base-gguf", "candidate", "text"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=10)
    parser.add_argument("--threads", type=int, default=physical_cores())
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        theirs = run_theirs(args, Path(folder) / "logits")
    report = evaluate(EvalConfig(args.candidate, base=args.base, text=args.text, context=args.context, chunks=args.chunks,
                                 threads=args.threads))
    ours = report["quality"]["texts"][0]
    rows, result, agree = [["", "llama-perplexity", "llmc", "difference", "allowed"]], {}, True
    for name, (value, error) in theirs.items():
        mine = ours[name]
        change = mine["value"] / value - 1
        allowed = TOLERANCE.get(name)
        agree &= allowed is None or abs(change) <= allowed
        rows.append([name, f"{value:.5f} ± {error:.5f}", f"{mine['value']:.5f} ± {mine['se_token']:.5f}", f"{change:+.3%}",
                     f"{allowed:.1%}" if allowed else ""])
        result[name] = {"theirs": value, "ours": mine["value"], "their_se": error, "our_se_token": mine["se_token"]}
    print(table(rows))
    print(json.dumps({"candidate": Path(args.candidate).name, "text": ours["protocol"]["text"], "chunks": args.chunks,
                      "context": args.context, "agree": agree, "figures": result}))
    sys.exit(0 if agree else 1)


if __name__ == "__main__":
    main()
