"""Measure the peak memory of `llmc quantize` on a synthetic 1.5 B Llama-shaped model with random weights.

    python benchmarks/memory.py --work /some/empty/folder [--layers 28] [--samples 16] [--limit-gb 3]

The shape is that of a 1.5 B model with a wide feed-forward (hidden 1536, intermediate 8960, 28 layers, vocabulary 151,936,
tied), with one shard for each layer. Only the shapes decide memory, so the weights may be random. `--layers` makes a shorter
model of the same width. Its peak is the same, because one layer is in memory at a time. The script prints one JSON line. Exit
code 1 if the peak is above the limit.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD, VOCAB = 1536, 8960, 12, 2, 128, 151_936
TEXT = "\n\n".join(topics[k] for k in sorted(topics))


def build(folder: Path, layers: int) -> None:
    """Write the model shard by shard, with at most one tensor in memory."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    total = 0

    def shard(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
        nonlocal total
        tensors = {k: (torch.ones(s) if len(s) == 1 else torch.randn(s, generator=generator) * 0.02).half()
                   for k, s in shapes.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        total += sum(t.numel() for t in tensors.values()) * 2

    shard("model-embedding.safetensors", {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)})
    for i in range(layers):
        at = f"model.layers.{i}."
        shard(f"model-layer-{i:02d}.safetensors", {
            at + "self_attn.q_proj.weight": (HEADS * HEAD, HIDDEN),
            at + "self_attn.k_proj.weight": (KV_HEADS * HEAD, HIDDEN),
            at + "self_attn.v_proj.weight": (KV_HEADS * HEAD, HIDDEN),
            at + "self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD),
            at + "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN), at + "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
            at + "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
            at + "input_layernorm.weight": (HIDDEN,), at + "post_attention_layernorm.weight": (HIDDEN,)})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": layers,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD,
        "vocab_size": VOCAB, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        "rope_theta": 1e6, "torch_dtype": "float16", "bos_token_id": 0, "eos_token_id": 1}))
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=["<s>", "</s>"], show_progress=False)
    tok.train_from_iterator([TEXT], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit-gb", type=float, default=3.0)
    args = parser.parse_args()
    folder, text = args.work / "model", args.work / "text.txt"
    if not folder.exists():
        build(folder, args.layers)
    text.write_text(TEXT, encoding="utf-8")
    start = time.monotonic()
    command = [sys.executable, "-m", "llmc", "quantize", folder, "--calibration", text, "--samples", str(args.samples),
               "--threads", str(args.threads), "-o", args.work / "out", "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(json.dumps({"layers": args.layers, "samples": args.samples, "peak_rss": peak,
                      "seconds": round(time.monotonic() - start, 1), "bytes": json.loads(done.stdout)["bytes"]}))
    sys.exit(0 if peak < args.limit_gb * 1e9 else 1)


if __name__ == "__main__":
    main()
