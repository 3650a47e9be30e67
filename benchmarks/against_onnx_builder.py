"""Compare llmc's 4-bit ONNX with that of onnxruntime-genai's model builder, on the same base, settings and runtime.

The builder rounds the float base (`-p int4`, blocks of 32, symmetric; embedding and head are one 8-bit matrix if the base
ties them). llmc's folder has the codes that `llmc quantize` chose. The script reads both graphs and checks that they agree in
bits, block, symmetry and accuracy level of every MatMulNBits, and in size within 1 %. A third row is the GGUF of llmc's
folder in llama.cpp, with the KL divergence between the two exported files. The float base runs once on each text. Speeds are
those of `llmc bench`, with the files in turns in one run; the ratio is the median over the rounds. The script prints a table
and one JSON line. Exit code 1 if llmc's divergence is larger on a text. Files that are already in the folder `--work` are not
made again.

    python benchmarks/against_onnx_builder.py --base MODEL_FOLDER --calibration mixed.txt --text wiki.test.raw \
        --text tinystories.txt --work /some/empty/folder [--quantized FOLDER] [--accuracy-level 0]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from llmc.console import progress, say, size
from llmc.evals.bench.config import BenchConfig
from llmc.evals.bench.run import bench
from llmc.evals.quality import metrics
from llmc.evals.quality.protocol import FolderTokenizer, cut
from llmc.evals.report.sections import speeds_of
from llmc.evals.report.show import markdown
from llmc.formats.artifacts.table import artifact_at
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.onnx_folder import open_onnx
from llmc.machine import physical_cores
from llmc.runtimes.open import open_runtime

OURS, THEIRS, GGUF = "llmc, ONNX", "builder, ONNX", "llmc, GGUF"
BLOCK, MOST_APART = 32, 0.01


def command(*words: object) -> None:
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(str(w) for w in words[:4])} … failed:\n{done.stderr[-3000:]}")


def make(args: argparse.Namespace) -> dict[str, Path]:
    """Make every candidate's file or folder. Those that are already there are used."""
    work, llmc = args.work, [sys.executable, "-m", "llmc"]
    work.mkdir(parents=True, exist_ok=True)
    folder, level = args.quantized or work / "llmc", args.accuracy_level
    files = {OURS: work / f"llmc-onnx-{level}", THEIRS: work / f"builder-{level}", GGUF: work / "llmc.gguf"}
    common = ["--threads", args.threads]
    if not folder.exists():
        command(*llmc, "quantize", args.base, "--bits", 4, "--group-size", BLOCK, "--calibration", args.calibration, *common,
                "-o", folder)
    if not files[OURS].exists():
        command(*llmc, "export", folder, "--format", "onnx", "--accuracy-level", level, *common, "-o", files[OURS])
    if not files[GGUF].exists():
        command(*llmc, "export", folder, "--format", "gguf", *common, "-o", files[GGUF])
    if not files[THEIRS].exists():
        tied = str(bool(Checkpoint.open(args.base).config.get("tie_word_embeddings"))).lower()
        # algo_config=default would name a shared 8-bit table wrongly: ONNX Runtime 1.31 refuses that file (builder 0.18)
        unfinished = work / f".builder-{level}.unfinished"
        command(sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", args.base, "-o", unfinished, "-p", "int4",
                "-e", "cpu", "-c", work / "cache", "--extra_options", "algo_config=rtn", f"block_size={BLOCK}",
                "is_symmetric=true", f"accuracy_level={level}", "matmul_mixed_precision=last_matmul:int8",
                f"shared_embeddings={tied}", "hf_token=false")
        unfinished.rename(files[THEIRS])
    return files


def check_alike(files: dict[str, Path]) -> None:
    """Exit if the settings of the two graphs differ."""
    asked = {name: open_onnx(files[name]).matmul_nbits() for name in (OURS, THEIRS)}
    if asked[OURS] != asked[THEIRS]:
        sys.exit("the two files are made differently:\n" + "\n".join(f"{name}: {a}" for name, a in asked.items()))
    ours, theirs = (int(artifact_at(files[name]).weigh()["file_bytes"]) for name in (OURS, THEIRS))
    if abs(ours / theirs - 1) > MOST_APART:
        sys.exit(f"the two files differ in size: {ours:,} and {theirs:,} bytes")


def measure(files: dict[str, Path], args: argparse.Namespace) -> tuple[dict[str, list[Any]], list[Any]]:
    """Perplexity, KL divergence and top-1 agreement of every file, {name: [one result for each text]}; and for every text the
    KL divergence between the GGUF and the ONNX of the same codes."""
    tokenizer, base = FolderTokenizer(Path(args.base)), open_runtime(Path(args.base), args.context, args.threads, "cpu")
    runtimes = {name: open_runtime(path, args.context, args.threads, "cpu") for name, path in files.items()}
    found: dict[str, list[Any]] = {name: [] for name in files}
    between = []
    for text in args.text:
        job = cut(text, Path(text).read_text(encoding="utf-8"), tokenizer, args.context, args.chunks)
        seen: dict[str, list[tuple[Any, ...]]] = {name: [] for name in files}
        base_nll, apart = [], []
        with progress(f"evaluating {Path(text).name}, chunk", len(job.ids)) as p:
            for ids in job.ids:
                targets, wanted = ids[job.first + 1 :], base.logits(ids[:-1], job.first)
                got = {name: runtime.logits(ids[:-1], job.first) for name, runtime in runtimes.items()}
                base_nll.append(metrics.nll(wanted, targets))
                apart.append(metrics.divergence(got[OURS], got[GGUF])[0])
                for name, logits in got.items():
                    seen[name].append((metrics.nll(logits, targets), *metrics.divergence(wanted, logits)))
                p.step()
        between.append(metrics.mean(np.stack(apart)))
        for name, chunks in seen.items():
            nll, kld, top1 = (np.stack(x) for x in zip(*chunks, strict=True))
            found[name].append(metrics.summarise(nll, job.protocol.bytes, kld, top1, np.stack(base_nll)))
        say(f"{Path(text).name}: KL divergence " + ", ".join(f"{n} {q[-1]['kld']['value']:.4f}" for n, q in found.items())
            + f", llmc's two files {between[-1]['value']:.4f}")
    for runtime in (base, *runtimes.values()):
        runtime.close()
    return found, between


def speeds(files: dict[str, Path], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Run `llmc bench` on all files, in turns. 'ratio': speed of llmc's ONNX divided by that of the file, by round."""
    reports = bench(BenchConfig(tuple(str(f) for f in files.values()), prompt=args.prompt, generate=args.generate,
                                repetitions=args.rounds, threads=args.threads))
    found = {name: speeds_of(r)["local-cpu"] for name, r in zip(files, reports, strict=True)}
    for s in found.values():
        s["ratio"] = {kind: float(np.median(np.array(found[OURS][kind]["values"]) / np.array(s[kind]["values"])))
                      for kind in ("prefill", "decode")}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--calibration", help="calibration text of llmc quantize; not needed with --quantized")
    parser.add_argument("--quantized", type=Path, help="a folder that llmc quantize made from the base: 4 bits, groups of 32")
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--accuracy-level", choices=("0", "4"), default="4")
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--generate", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=physical_cores())
    args = parser.parse_args()
    if not (args.calibration or args.quantized):
        parser.error("give --calibration or --quantized")
    files = make(args)
    check_alike(files)
    quality, between = measure(files, args)
    speed = speeds(files, args)
    rows = [["", "size", *(f"{Path(t).name}: PPL, KLD, top-1" for t in args.text), "prefill", "decode", "load", "peak RSS"]]
    figures = {}
    for name, path in files.items():
        s, nbytes = speed[name], int(artifact_at(path).weigh()["file_bytes"])
        rows.append([name, size(nbytes),
                     *(f"{q['perplexity']['value']:.2f}, {q['kld']['value']:.4f} ± {q['kld']['se'] or 0:.4f}, "
                       f"{100 * q['top1']['value']:.1f} %" for q in quality[name]),
                     *(f"{s[kind]['median']:.1f} ± {s[kind]['iqr']:.1f}" for kind in ("prefill", "decode")),
                     f"{s['load_s']:.2f} s", size(s["peak_rss"])])
        figures[name] = {"bytes": nbytes, "load_s": s["load_s"], "peak_rss": s["peak_rss"], "unstable": s["unstable"],
                         "ratio": s["ratio"], **{kind: s[kind]["median"] for kind in ("prefill", "decode")},
                         **{kind: [q[kind]["value"] for q in quality[name]] for kind in ("perplexity", "kld", "top1")}}
    print(markdown(rows), flush=True)
    ratios = [a / b for a, b in zip(figures[OURS]["kld"], figures[THEIRS]["kld"], strict=True)]
    print(json.dumps({
        "texts": args.text, "chunks": args.chunks, "context": args.context, "accuracy_level": int(args.accuracy_level),
        "figures": figures, "kld_ratios": ratios, "size_ratio": figures[OURS]["bytes"] / figures[THEIRS]["bytes"],
        "speed_ratios": figures[THEIRS]["ratio"], "kld_between_onnx_and_gguf": between}))
    sys.exit(0 if all(r <= 1 for r in ratios) else 1)


if __name__ == "__main__":
    main()
