"""Measure what experts cost `llmc quantize`: its memory on a model like Qwen3-30B-A3B, and how much few tokens are worth.

    python benchmarks/experts.py memory --work FOLDER --tokenizer MODEL --layers 2
    python benchmarks/experts.py shrink --work FOLDER --steps 600

memory: writes a folder of the shape of Qwen3-30B-A3B (48 layers of 128 experts) as a sparse file, with noise in two layers
and zeros in the others, quantizes two layers of it and prints the peak of its memory, that of its plan, and the
seconds of a layer. Expected: at most 4 GB.
Seen so far, on 2 cores that others used too, with 16 x 512 tokens: 3.1 GB with 48 layers and 2.9 GB with 2 (planned:
2.4 GB), both before layer 0 began to change its experts. No layer was finished. GPTQ of one expert takes 4.4 CPU seconds
(3.6 of [1536, 2048] and 0.8 of [2048, 768]), which would be 9 to 10 CPU minutes for the 128 experts of a layer.
shrink: trains a small mixture of experts on CPython's help text and quantizes it to q4_0 with little text: rounded to
nearest, and by GPTQ with experts' statistics that lean on the layer's with different strength (compress/mixture_run.py). It
prints the KL divergence on text that neither training nor calibration saw. Expected: GPTQ below rounding to nearest at any
strength.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import llmc
from llmc.compress import layer_run
from llmc.formats.hf import load_torch_model

A3B: dict[str, Any] = {
    "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_hidden_layers": 48, "num_experts": 128, "num_experts_per_tok": 8, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "norm_topk_prob": True, "tie_word_embeddings": False,
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "torch_dtype": "bfloat16",
    "max_position_embeddings": 40_960, "rope_theta": 1_000_000.0, "rms_norm_eps": 1e-6,
}
FULL = (0, 1)  # layers with noise
STRENGTHS = (0.0, 0.05, 0.25, 1.0, 4.0)


def sparse_folder(folder: Path, config: dict[str, Any], full: tuple[int, ...]) -> None:
    """Write a model as a sparse file: noise in the embedding, the head and some layers, zeros elsewhere."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    h, inner, kv = config["hidden_size"], config["moe_intermediate_size"], config["num_key_value_heads"] * config["head_dim"]
    q = config["num_attention_heads"] * config["head_dim"]
    shapes: dict[str, list[int]] = {"model.embed_tokens.weight": [config["vocab_size"], h], "lm_head.weight":
                                    [config["vocab_size"], h], "model.norm.weight": [h]}
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}"
        shapes |= {f"{p}.input_layernorm.weight": [h], f"{p}.post_attention_layernorm.weight": [h],
                   f"{p}.self_attn.q_proj.weight": [q, h], f"{p}.self_attn.k_proj.weight": [kv, h],
                   f"{p}.self_attn.v_proj.weight": [kv, h], f"{p}.self_attn.o_proj.weight": [h, q],
                   f"{p}.self_attn.q_norm.weight": [config["head_dim"]], f"{p}.self_attn.k_norm.weight": [config["head_dim"]],
                   f"{p}.mlp.gate.weight": [config["num_experts"], h]}
        for e in range(config["num_experts"]):
            shapes |= {f"{p}.mlp.experts.{e}.gate_proj.weight": [inner, h], f"{p}.mlp.experts.{e}.up_proj.weight": [inner, h],
                       f"{p}.mlp.experts.{e}.down_proj.weight": [h, inner]}
    header, offset = dict[str, Any](), 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    generator = torch.Generator().manual_seed(0)
    with (folder / "model.safetensors").open("wb") as f:
        f.write(struct.pack("<Q", len(raw)) + raw)
        start = f.tell()
        f.truncate(start + offset)
        for name, entry in header.items():
            if not name.startswith("model.layers.") or int(name.split(".")[2]) in full:
                value = torch.randn(entry["shape"], generator=generator)
                value = 1 + 0.1 * value if len(entry["shape"]) == 1 else 0.02 * value
                f.seek(start + entry["data_offsets"][0])
                f.write(value.to(torch.bfloat16).view(torch.uint8).numpy().data)


def memory(args: argparse.Namespace) -> dict[str, Any]:
    folder, out = args.work / f"a3b-{args.depth}", args.work / f"a3b-{args.depth}-q4"
    if not folder.is_dir():
        sparse_folder(folder, {**A3B, "num_hidden_layers": args.depth}, FULL)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(args.tokenizer / name, folder)
    text = args.work / "text.txt"
    text.write_text("\n\n".join(topics[k] for k in sorted(topics)), encoding="utf-8")
    shutil.rmtree(work := out.with_name(f".{out.name}.unfinished"), ignore_errors=True)
    command = [sys.executable, "-m", "llmc", "quantize", folder, "--type", "q4_0", "--calibration", text, "-o", out,
               "--samples", args.samples, "--seq-len", args.seq_len]
    planned = json.loads(subprocess.run([*map(str, command), "--dry-run", "--json"], check=True, capture_output=True).stdout)
    start = time.monotonic()
    process = subprocess.Popen([*map(str, command)])
    ends: list[float] = []
    ended, usage = 0, None
    while not ended and len(ends) < args.layers:
        time.sleep(1)
        ended, _, usage = os.wait4(process.pid, os.WNOHANG)
        state = work / "state.json"
        done = json.loads(state.read_text())["done"] if state.is_file() else 0
        ends += [time.monotonic() - start] * (done - len(ends))
    if not ended:
        process.send_signal(signal.SIGINT)
        _, _, usage = os.wait4(process.pid, 0)
    return {"peak_gb": usage.ru_maxrss * 1024 / 1e9, "planned_gb": planned["memory_bytes"] / 1e9,
            "cpu_seconds": round(usage.ru_utime + usage.ru_stime), "seconds_to_layer": [round(e) for e in ends],
            "tokens": args.samples * args.seq_len, "threads": torch.get_num_threads()}


def train(folder: Path, steps: int) -> None:
    """A mixture of 16 experts in 3 layers, trained on CPython's help text; its last tenth is left out."""
    corpus = "\n\n".join(topics[k] for k in sorted(topics))
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok.train_from_iterator([corpus], trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<s>"], show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="<s>")
    ids = torch.tensor(tokenizer(corpus).input_ids)
    ids = ids[: len(ids) * 9 // 10]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(
        "qwen3_moe", vocab_size=512, hidden_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, moe_intermediate_size=64, num_experts=16, num_experts_per_tok=2, norm_topk_prob=True, bos_token_id=0,
        eos_token_id=0, output_router_logits=True, router_aux_loss_coef=0.01, tie_word_embeddings=True))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for _ in range(steps):
        batch = torch.stack([ids[a : a + 64] for a in torch.randint(0, len(ids) - 64, (24,))])
        model(batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.config.output_router_logits = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def divergence(folder: Path, base: Path, ids: torch.Tensor) -> tuple[float, float]:
    """(mean KL divergence in nats, its standard error over sequences)."""
    p, q = (torch.log_softmax(load_torch_model(f)(ids).logits.double(), -1) for f in (base, folder))
    by_sequence = (p.exp() * (p - q)).sum(-1).mean(1)
    return float(by_sequence.mean()), float(by_sequence.std() / len(ids) ** 0.5)


def shrink(args: argparse.Namespace) -> dict[str, Any]:
    base = args.work / "trained"
    if not base.is_dir():
        train(base, args.steps)
    corpus = "\n\n".join(topics[k] for k in sorted(topics))
    text = args.work / "calibration.txt"
    text.write_text(corpus[: len(corpus) // 2], encoding="utf-8")
    ids = torch.tensor(PreTrainedTokenizerFast.from_pretrained(base)(corpus[-40_000:]).input_ids)[: 64 * 64].view(64, 64)
    found: dict[str, Any] = {}

    def measure(name: str, **options: Any) -> None:
        out = args.work / f"q-{name}"
        shutil.rmtree(out, ignore_errors=True)
        llmc.quantize(base, type="q4_0", out=out, **options)
        found[name] = divergence(out, base, ids)

    measure("rtn", method="rtn")
    for samples in (16, 64, 256):
        for strength in STRENGTHS:
            layer_run.STRENGTH = strength  # type: ignore[misc]
            measure(f"gptq-{samples * 64}-tokens-strength-{strength:g}", calibration=str(text), samples=samples, seq_len=64)
    return {name: f"{kld:.5f} ± {error:.5f}" for name, (kld, error) in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("memory", "shrink"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, help="a folder with a tokenizer, for `memory`")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--layers", type=int, default=len(FULL), help="layers to run, for `memory`")
    parser.add_argument("--depth", type=int, default=A3B["num_hidden_layers"],
                        help="layers of the model, for `memory`: reading and hashing 48 takes longer than a layer")
    parser.add_argument("--steps", type=int, default=600)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for name, value in (memory if args.what == "memory" else shrink)(args).items():
        print(f"{name:40} {value}")


if __name__ == "__main__":
    main()
