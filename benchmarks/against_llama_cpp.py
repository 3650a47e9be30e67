"""Compare llmc with llama.cpp and its importance matrix, on the same base, calibration text and file formats.

llama-imatrix gets exactly the text that llmc calibrates on (the sequences that llmc chose, decoded). llama-quantize writes
every linear in one type (`--pure`), as llmc does. Then all files run in llama.cpp as in `llmc eval`, and the base runs once:
the result is the KL divergence to the float base on every text. The script prints a table and one JSON line. Exit code 1 if
llmc loses on a text at a type. `--heal STEPS` adds a file that `llmc heal` trained further. Files that are already in the
folder `--work` are not made again.

    python benchmarks/against_llama_cpp.py --bin llama.cpp/build/bin --base MODEL_FOLDER --calibration mixed.txt \
        --text wiki.test.raw --text tinystories.txt --work /some/empty/folder \
        [--type q4_0 --type q8_0] [--transform rotate+scaling] [--heal 160]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from llmc.compress.text import load_calibration
from llmc.console import progress
from llmc.evals.quality import metrics
from llmc.evals.quality.protocol import FolderTokenizer, cut
from llmc.evals.report.show import table
from llmc.formats.hf import load_tokenizer
from llmc.machine import physical_cores
from llmc.runtimes.amx import use_extra_buffers
from llmc.runtimes.open import open_runtime

CONTEXT = 512


def timed(*command: object) -> dict[str, float]:
    """Run a command. Returns wall seconds, seconds of all its cores, and its peak resident memory in bytes."""
    start = time.monotonic()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([str(c) for c in command], stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            sys.exit(f"{command[0]} failed:\n{log.read().decode(errors='replace')[-3000:]}")
    return {"seconds": time.monotonic() - start, "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "peak_rss": usage.ru_maxrss * 1024}


def make(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Make every candidate: {name: {'file', 'seconds'}}. Files that are already there are used."""
    work, llmc = args.work, [sys.executable, "-m", "llmc"]
    work.mkdir(parents=True, exist_ok=True)
    made: dict[str, dict[str, Any]] = {}

    def candidate(name: str, *commands: tuple[object, ...]) -> Path:
        path = work / f"{name}.gguf"
        runs = [] if path.exists() else [timed(*c) for c in commands]
        made[name] = {"file": path, "seconds": sum(r["seconds"] for r in runs),
                      "peak_rss": max((r["peak_rss"] for r in runs), default=0)}
        return path

    common = ["--calibration", args.calibration, "--samples", args.samples, "--seq-len", 512, "--threads", args.threads]
    for qtype in args.type:
        folder = work / f"llmc-{qtype}"
        candidate(f"llmc-{qtype}", (*llmc, "quantize", args.base, "--type", qtype, "--transform", args.transform, *common,
                                   "-o", folder),
                  (*llmc, "export", folder, "--format", "gguf", "-o", work / f"llmc-{qtype}.gguf"))
        if args.heal:
            healed = work / f"llmc-{qtype}-healed"
            candidate(healed.name, (*llmc, "heal", folder, "--teacher", args.base, "--steps", args.heal, "--calibration",
                                    args.calibration, "--threads", args.threads, "-o", healed),
                      (*llmc, "export", healed, "--format", "gguf", "-o", healed.with_name(f"{healed.name}.gguf")))
    f16 = candidate("f16", (*llmc, "export", args.base, "--format", "gguf", "-o", work / "f16.gguf"))
    tokenizer = load_tokenizer(Path(args.base))
    chosen = load_calibration(args.calibration, tokenizer, args.samples, 512).sequences
    text, matrix = work / "calibration.txt", work / "imatrix.gguf"
    text.write_text(tokenizer.decode(chosen.flatten().tolist()), encoding="utf-8")
    plain = [] if use_extra_buffers() else ["--no-repack"]  # a build with broken AMX kernels crashes without it
    imatrix = (args.bin / "llama-imatrix", "-m", f16, "-f", text, "-o", matrix, "-c", 512, "-t", args.threads, *plain)
    quantize = (args.bin / "llama-quantize", "--pure", "--imatrix", matrix, "--token-embedding-type", "q8_0", f16)
    matrix_seconds = 0.0 if matrix.exists() else timed(*imatrix)["seconds"]
    for qtype in args.type:
        candidate(f"llama.cpp-{qtype}", (*quantize, work / f"llama.cpp-{qtype}.gguf", qtype.upper(), args.threads))
        made[f"llama.cpp-{qtype}"]["seconds"] += matrix_seconds
    return made


def measure(files: dict[str, Path], args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Perplexity, KL divergence and top-1 agreement of every file or folder: {name: [one result for each text]}."""
    tokenizer, base = FolderTokenizer(Path(args.base)), open_runtime(Path(args.base), CONTEXT, args.threads, "cpu")
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in files}
    runtimes = {name: open_runtime(path, CONTEXT, args.threads, "cpu") for name, path in files.items()}
    for text in args.text:
        job = cut(text, Path(text).read_text(encoding="utf-8"), tokenizer, CONTEXT, args.chunks)
        seen: dict[str, list[tuple[Any, ...]]] = {name: [] for name in files}
        base_nll = []
        with progress(f"evaluating {Path(text).name}, chunk", len(job.ids)) as p:
            for ids in job.ids:
                targets, wanted = ids[job.first + 1 :], base.logits(ids[:-1], job.first)
                base_nll.append(metrics.nll(wanted, targets))
                for name, runtime in runtimes.items():
                    got = runtime.logits(ids[:-1], job.first)
                    seen[name].append((metrics.nll(got, targets), *metrics.divergence(wanted, got)))
                p.step()
        for name, chunks in seen.items():
            nll, kld, top1 = (np.stack(x) for x in zip(*chunks, strict=True))
            found[name].append(metrics.summarise(nll, job.protocol.bytes, kld, top1, np.stack(base_nll)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=Path, required=True, help="folder of llama-imatrix and llama-quantize")
    parser.add_argument("--base", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--type", action="append", help="GGUF type; may be repeated (default: q4_0 and q8_0)")
    parser.add_argument("--transform", default="none", help="--transform of llmc quantize, as in rotate+scaling")
    parser.add_argument("--heal", type=int, default=0, help="number of steps of llmc heal; 0 means no healing")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--threads", type=int, default=physical_cores())
    args = parser.parse_args()
    args.type = args.type or ["q4_0", "q8_0"]
    made = make(args)
    header = ["", "bytes", "seconds", *(f"{Path(t).name}: PPL, KLD, top-1" for t in args.text)]
    rows, figures = [header], {}
    for name, texts in measure({n: c["file"] for n, c in made.items() if n != "f16"}, args).items():
        size, seconds = made[name]["file"].stat().st_size, made[name]["seconds"]
        rows.append([name, f"{size:,}", f"{seconds:.0f}",
                     *(f"{q['perplexity']['value']:.2f}  {q['kld']['value']:.4f} ± {q['kld']['se']:.4f}"
                       f"  {100 * q['top1']['value']:.1f} %" for q in texts)])
        figures[name] = {"kld": [q["kld"]["value"] for q in texts], "bytes": size, "seconds": round(seconds, 1),
                         "peak_rss": made[name]["peak_rss"]}
    print(table(rows), flush=True)
    ratios = {}
    for name in (n for n in figures if n.startswith("llmc-")):
        qtype = name.removeprefix("llmc-").removesuffix("-healed")
        theirs = figures[f"llama.cpp-{qtype}"]["kld"]
        ratios[name] = [a / b for a, b in zip(figures[name]["kld"], theirs, strict=True)]
    print(json.dumps({"texts": args.text, "chunks": args.chunks, "figures": figures, "kld_ratios": ratios}))
    sys.exit(0 if all(r <= 1 for pair in ratios.values() for r in pair) else 1)


if __name__ == "__main__":
    main()
