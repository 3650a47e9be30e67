"""Compare estimates of this machine's own speeds with `llmc bench`, for every type at two model sizes.

    python benchmarks/estimates.py --llama-quantize BIN/llama-quantize --base-gguf small-f16.gguf \\
        --base-gguf larger-f16.gguf --work /some/folder [--types q4_0,q4_k,…] [FILE.gguf …]

The script makes a file of each type from each base: all matrices have that type, the embedding has 8 bits, and widths that
are not a multiple of 256 get llama.cpp's fallback type. Then it benches all files of a base in turns. The kernels on which
the estimate rests are measured after the first benches, on files filled with zeros: nothing is fitted to the models.
It prints a table and one JSON line. Exit code 1 if the error of a decode estimate is larger than --limit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from llmc.evals.bench.config import BenchConfig
from llmc.evals.bench.run import bench
from llmc.evals.fit.validate import rows, validate
from llmc.evals.report.show import table

BLOCK_TYPES = "q4_0,q4_1,q5_0,q5_1,q8_0,iq4_nl,iq4_xs,q2_k,q3_k,q4_k,q5_k,q6_k,f16"
KERNELS = Path(".llmc/kernel-rates.json")  # in the working folder, where `llmc fit` keeps them


def files_of(base: Path, types: list[str], tool: Path, work: Path) -> list[Path]:
    """One .gguf file for each type. Missing files are made."""
    out = []
    for qtype in types:
        if qtype == "f16":
            out.append(base)
            continue
        path = work / f"{base.parent.name}-{base.stem}-{qtype}.gguf"
        if not path.is_file():
            named = {"q3_k": "Q3_K_S", "q4_k": "Q4_K_S", "q5_k": "Q5_K_S"}.get(qtype, qtype.upper())
            subprocess.run([tool, "--pure", "--token-embedding-type", "q8_0", base, path, named], check=True,
                           capture_output=True)
        out.append(path)
    return out


def _lengths(written: str) -> tuple[int, ...]:
    return tuple(int(n) for n in written.split(","))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="more .gguf files to compare with their estimates")
    parser.add_argument("--base-gguf", action="append", type=Path, default=[])
    parser.add_argument("--llama-quantize", type=Path)
    parser.add_argument("--types", default=BLOCK_TYPES)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--prompt", default="512,128")
    parser.add_argument("--depth", default="0,512")
    parser.add_argument("--generate", type=int, default=64)
    parser.add_argument("--max-repetitions", type=int, default=15)
    parser.add_argument("--limit", type=float, default=0.20)
    args = parser.parse_args()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    groups = [files_of(b.resolve(), args.types.split(","), args.llama_quantize.resolve(), work) for b in args.base_gguf]
    groups += [[f.resolve() for f in args.files]] if args.files else []
    os.chdir(work)
    KERNELS.unlink(missing_ok=True)
    points = []
    for group in groups:
        reports = [work / f"{f.parent.name}-{f.stem}.json" for f in group]
        for r in reports:
            r.unlink(missing_ok=True)
        bench(BenchConfig(tuple(map(str, group)), prompt=_lengths(args.prompt), depth=_lengths(args.depth),
                          generate=args.generate, max_repetitions=args.max_repetitions, outputs=tuple(reports)))
        points += validate(tuple(reports), profiles=False)
    print(table(rows(points)))
    decode = [p for p in points if p["what"].startswith("decode")]
    worst = max(decode, key=lambda p: abs(p["error"]))
    print(json.dumps({"decode_points": len(decode), "worst": worst, "within_limit": abs(worst["error"]) <= args.limit,
                      "inside_interval": sum(p["inside"] for p in decode), "points": points}))
    sys.exit(0 if abs(worst["error"]) <= args.limit else 1)


if __name__ == "__main__":
    main()
