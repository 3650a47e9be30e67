"""The floor: is the default of llmc anywhere worse than llama.cpp's own files, made from the same tokens?

For each base and each number of calibration tokens, llmc makes `--bits 4` (and, with --goal, `--goal gguf`), and llama.cpp
makes Q4_0, IQ4_NL and Q4_K_M with an importance matrix of exactly the tokens that llmc took. All files run in llama.cpp, as
in `llmc eval`; the result is the KL divergence to the float base on every text. Exit code 1 if `--bits 4` has more than 0.9
of the divergence of Q4_0, or `--goal gguf` more than 0.8 of that of Q4_K_M, or one of them more bytes. Files that are in the
folder `--work` are not made again.

    python benchmarks/floor.py --bin llama.cpp/build/bin --base MODEL_FOLDER --base OTHER_MODEL --calibration mixed.txt \
        --text wiki.test.raw --text tinystories.txt --work FOLDER [--tokens 3072 --tokens 16384 --tokens 65536] [--goal]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from against_llama_cpp import measure, timed

from llmc.compress.text import load_calibration
from llmc.evals.report.show import table
from llmc.formats.hf import load_tokenizer
from llmc.machine import physical_cores
from llmc.runtimes.amx import use_extra_buffers

LENGTH = 512
THEIRS = ("q4_0", "iq4_nl", "q4_k_m")
FLOOR = (("llmc --bits 4", "llama.cpp q4_0", 0.9), ("llmc --goal gguf", "llama.cpp q4_k_m", 0.8))


def make(base: str, samples: int, work: Path, args: argparse.Namespace) -> dict[str, Path]:
    """Make the files of one base from `samples` sequences: {name: file}."""
    work.mkdir(parents=True, exist_ok=True)
    llmc, made = [sys.executable, "-m", "llmc"], dict[str, Path]()
    goals = {"llmc --bits 4": ("--bits", 4), **({"llmc --goal gguf": ("--goal", "gguf")} if args.goal else {})}
    for name, options in goals.items():
        made[name] = work / f"{name.replace(' ', '')}.gguf"
        if not made[name].exists():
            folder = made[name].with_suffix("")
            timed(*llmc, "quantize", base, *options, "--no-carry", "--calibration", args.calibration, "--samples", samples,
                  "--seq-len", LENGTH, "--threads", args.threads, "-o", folder)
            timed(*llmc, "export", folder, "--format", "gguf", "-o", made[name])
    f16 = work.parent / "f16.gguf"
    if not f16.exists():
        timed(*llmc, "export", base, "--format", "gguf", "-o", f16)
    text, matrix = work / "calibration.txt", work / "imatrix.gguf"
    if not matrix.exists():
        tokenizer = load_tokenizer(Path(base))
        chosen = load_calibration(args.calibration, tokenizer, samples, LENGTH).sequences
        text.write_text(tokenizer.decode(chosen.flatten().tolist(), skip_special_tokens=True), encoding="utf-8")
        plain = [] if use_extra_buffers() else ["--no-repack"]  # a build with broken AMX kernels crashes without it
        timed(args.bin / "llama-imatrix", "-m", f16, "-f", text, "-o", matrix, "-c", LENGTH, "-t", args.threads, *plain)
    for preset in THEIRS:
        made[f"llama.cpp {preset}"] = file = work / f"llama.cpp-{preset}.gguf"
        if not file.exists():
            timed(args.bin / "llama-quantize", "--imatrix", matrix, f16, file, preset.upper(), args.threads)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=Path, required=True, help="folder of llama-imatrix and llama-quantize")
    parser.add_argument("--base", action="append", required=True, help="a model folder; may be repeated")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokens", type=int, action="append", help="calibration tokens; may be repeated")
    parser.add_argument("--goal", action="store_true", help="make --goal gguf too, which measures the model first")
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--threads", type=int, default=physical_cores())
    args = parser.parse_args()
    rows: list[list[str]] = [["base", "tokens", "file", "bytes", *(f"KLD {Path(t).name}" for t in args.text)]]
    figures: list[dict[str, Any]] = []
    fine = True
    for base in args.base:
        name = Path(base).name
        for tokens in args.tokens or [3072, 16384, 65536]:
            files = make(base, tokens // LENGTH, args.work / name / str(tokens), args)
            found = measure(files, SimpleNamespace(base=base, text=args.text, chunks=args.chunks, threads=args.threads))
            kld = {file: [q["kld"] for q in texts] for file, texts in found.items()}
            for file, path in files.items():
                rows.append([name, f"{tokens:,}", file, f"{path.stat().st_size:,}",
                             *(f"{k['value']:.4f} ± {k['se']:.4f}" for k in kld[file])])
            figures.append({"base": name, "tokens": tokens, "bytes": {f: p.stat().st_size for f, p in files.items()},
                            "kld": {f: [k["value"] for k in v] for f, v in kld.items()}})
            print(table([rows[0], *rows[-len(files):]]), flush=True)
            for ours, theirs, most in FLOOR:
                if ours in files:
                    ratios = [a["value"] / b["value"] for a, b in zip(kld[ours], kld[theirs], strict=True)]
                    size = files[ours].stat().st_size / files[theirs].stat().st_size
                    fine &= max(ratios) <= most and size <= 1
                    print(f"{ours}: {', '.join(f'{r:.2f}' for r in ratios)} of {theirs}, in {size:.3f} of its bytes",
                          flush=True)
    print(table(rows))
    print(json.dumps({"texts": args.text, "chunks": args.chunks, "figures": figures}))
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
