#!/usr/bin/env python3
"""Make several candidates of one model from Python, export them, and compare methods and numbers of bits on one page.

    python examples/quantize_and_compare.py MODEL OUT [--calibration FILE]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import llmc

# the name of each candidate, and its differences from the defaults of `llmc quantize`
CANDIDATES: dict[str, dict[str, Any]] = {
    "gptq-4bit": {},
    "rtn-4bit": {"method": "rtn"},
    "rtn-8bit": {"method": "rtn", "bits": 8},
}


def compare_candidates(model: Path, out: Path, calibration: str, samples: int, context: int, chunks: int) -> dict[str, Any]:
    """Make every candidate in `out`, evaluate each exported file against `model`, and write the page. Returns its data."""
    reports = []
    for name, options in CANDIDATES.items():
        text = {"calibration": calibration, "samples": samples, "seq_len": context}
        made = llmc.quantize(model, out=out / name, **text, **options)
        llmc.export(made["out"], format="gguf", out=out / f"{name}.gguf")
        reports.append(out / f"{name}.json")
        llmc.evaluate(out / f"{name}.gguf", base=model, out=reports[-1], context=context, chunks=chunks)
    return llmc.compare(*reports, page=out / "compare.html", max_kld="0.5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--calibration", default="self", help="a text file (default: text sampled from the model)")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--context", type=int, default=512, help="tokens in a sequence, for calibration and evaluation")
    parser.add_argument("--chunks", type=int, default=40, help="number of sequences for the evaluation")
    a = parser.parse_args()
    result = compare_candidates(a.model, a.out, a.calibration, a.samples, a.context, a.chunks)
    for artifact in result["artifacts"]:
        (text,) = artifact["report"]["quality"]["texts"]
        megabytes = artifact["report"]["artifact"]["size"]["file_bytes"] / 1e6
        print(f"{artifact['name']:<16} {megabytes:8.2f} MB   KL divergence {text['kld']['value']:.4f}")
    print(f"the page with the charts: {a.out / 'compare.html'}")


if __name__ == "__main__":
    main()
