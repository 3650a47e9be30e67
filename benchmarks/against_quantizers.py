"""Compare llmc with other quantizers at 4 bits in symmetric groups of 32, on the same base and sequences, in turns.

GPTQModel and auto-round need their own versions of packages, so each runs in the Python environment that is given for it.
llmc runs once without options, and once for each `--llmc` with more options of `llmc quantize`. Times and peak memory are
those of the whole process. All folders are GPTQ checkpoints. llmc runs them in torch and computes the KL divergence to the
float base on every text. The script prints a table and one JSON line. Folders that are already in `--work` are not made
again, and have no time.

    python benchmarks/against_quantizers.py --base MODEL_FOLDER --calibration mixed.txt --text wiki.test.raw \
        --text tinystories.txt --work /some/empty/folder --gptqmodel VENV/bin/python --auto-round VENV/bin/python \
        [--llmc "--transform rotate+scaling"] [--llmc "--heal 160"]
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from against_llama_cpp import measure, timed
from safetensors.torch import save_file

from llmc.compress.text import load_calibration
from llmc.evals.report.show import table
from llmc.formats.hf import load_tokenizer
from llmc.machine import physical_cores

PEERS = Path(__file__).parent / "peers"
ITERATIONS = 50  # of auto-round, for each layer; its default of 200 takes four times as long


def commands(args: argparse.Namespace) -> dict[str, tuple[Path, list[object]]]:
    """The quantizers to run: {name: (folder to make, command)}."""
    work, sequences = args.work, args.work / "sequences.safetensors"
    chosen = load_calibration(args.calibration, load_tokenizer(Path(args.base)), args.samples, 512).sequences
    save_file({"sequences": chosen.contiguous()}, sequences)
    found: dict[str, tuple[Path, list[object]]] = {}
    for i, options in enumerate(["", *args.llmc]):
        folder = work / f"llmc-{i}"
        found[f"llmc {options}".strip()] = folder, [
            sys.executable, "-m", "llmc", "quantize", args.base, "--bits", 4, "--calibration", args.calibration, "--samples",
            args.samples, "--seq-len", 512, "--threads", args.threads, *shlex.split(options), "-o", folder]
    for name, python, more in (("gptqmodel", args.gptqmodel, []), ("auto_round", args.auto_round, [ITERATIONS])):
        if python:
            folder = work / name
            script = PEERS / f"quantize_with_{name}.py"
            found[name] = folder, [python, script, args.base, sequences, folder, args.threads, *more]
    return found


def checkpoint(folder: Path) -> Path:
    """The folder with the config. auto-round makes it inside the folder that it is given."""
    return next(folder.rglob("config.json")).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--gptqmodel", type=Path, help="the Python of an environment with gptqmodel")
    parser.add_argument("--auto-round", type=Path, help="the Python of an environment with auto-round")
    parser.add_argument("--llmc", action="append", default=[], help="more options of `llmc quantize`, in one string")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--threads", type=int, default=physical_cores())
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    made: dict[str, dict[str, Any]] = {}
    for name, (folder, command) in commands(args).items():
        made[name] = {"folder": folder, **(timed(*command) if not folder.exists() else {})}
    found = measure({name: checkpoint(m["folder"]) for name, m in made.items()}, args)
    rows = [["", "seconds", "of a core", "peak RSS", *(f"{Path(t).name}: PPL, KLD, top-1" for t in args.text)]]
    for name, texts in found.items():
        cost = made[name]
        rows.append([name, *([f"{cost['seconds']:.0f}", f"{cost['cpu_seconds']:.0f}", f"{cost['peak_rss'] / 1e9:.2f} GB"]
                             if "seconds" in cost else ["-", "-", "-"]),
                     *(f"{q['perplexity']['value']:.2f}  {q['kld']['value']:.4f} ± {q['kld']['se']:.4f}"
                       f"  {100 * q['top1']['value']:.1f} %" for q in texts)])
    print(table(rows), flush=True)
    figures = {name: {"kld": [q["kld"]["value"] for q in texts], **{k: v for k, v in made[name].items() if k != "folder"}}
               for name, texts in found.items()}
    print(json.dumps({"texts": args.text, "chunks": args.chunks, "figures": figures}))


if __name__ == "__main__":
    main()
