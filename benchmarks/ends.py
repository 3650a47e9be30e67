"""What embedding and head cost: the KL divergence to the float model when only they are rounded, one at a time and both.

    python benchmarks/ends.py --base MODEL_FOLDER --text FILE [--text FILE] [--type q8_0 --type q6_k --type q4_k]

`ends_beside` of llmc/formats/quantized.py follows from these figures. benchmarks/README.md has them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from llmc.evals.report.show import table
from llmc.formats.hf import load_tokenizer, load_torch_model
from llmc.machine import physical_cores
from llmc.rounding.tables import CHUNK, round_rows

LENGTH, CHUNKS = 512, 4


def rounded(weight: torch.Tensor, qtype: str) -> torch.Tensor:
    """A matrix [out, in] as the export rounds it, some rows at a time."""
    return torch.cat([round_rows(rows, qtype).dequantize() for rows in weight.split(max(1, CHUNK // weight.shape[1]))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument("--type", action="append")
    args = parser.parse_args()
    torch.set_num_threads(physical_cores())
    tokenizer, model = load_tokenizer(args.base), load_torch_model(args.base, "cpu", torch.float32)
    texts = []
    for text in args.text:
        ids = tokenizer(Path(text).read_text(encoding="utf-8")[:60_000])["input_ids"]
        texts.append(torch.tensor(ids[: CHUNKS * LENGTH]).view(CHUNKS, LENGTH))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    floats = {"embedding": embedding.weight.data.clone(), "head": head.weight.data.clone()}
    head.weight = torch.nn.Parameter(floats["head"].clone())  # of its own, where they are tied

    def logits() -> list[torch.Tensor]:
        with torch.no_grad():
            return [torch.log_softmax(model(input_ids=ids, use_cache=False).logits[:, LENGTH // 2 : -1], -1) for ids in texts]

    base, figures = logits(), {}
    for qtype in args.type or ["q8_0", "q6_k", "q5_k", "q4_k", "q4_0"]:
        values = {end: rounded(w, qtype) for end, w in floats.items()}
        for which in (("embedding",), ("head",), ("embedding", "head")):
            for end, module in (("embedding", embedding), ("head", head)):
                module.weight.data.copy_(values[end] if end in which else floats[end])
            kld = [float((p.exp() * (p - q)).sum(-1).mean()) for p, q in zip(base, logits(), strict=True)]
            figures[f"{' and '.join(which)} {qtype}"] = kld
    print(table([["rounded", *(f"KLD {Path(t).name}" for t in args.text)],
                 *([name, *(f"{k:.5f}" for k in kld)] for name, kld in figures.items())]))
    print(json.dumps({"base": args.base.name, "texts": args.text, "kld": figures}))


if __name__ == "__main__":
    main()
