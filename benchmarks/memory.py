"""Compare the memory that the plans of commands predict with the measured peak, on models of six shapes with random weights.

    python benchmarks/memory.py --work /some/empty/folder [--shape 'deep narrow' …] [--command quantize …]

Each command runs as a process of its own with `--threads 2`. `planned` is `memory_bytes` of its `--dry-run --json`;
`measured` is the process's largest resident memory (ru_maxrss), pages of mapped files included. Only shapes decide memory, so
the weights are one random block that is repeated. Times are not compared. The script prints a table, the commands in full,
and one JSON line. Exit code 1 if a measured peak is more than --limit away from its plan.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXT = "\n\n".join(topics[k] for k in sorted(topics))[:100_000]
HEAD = 64  # width of an attention head


@dataclass(frozen=True)
class Shape:
    """A Llama-shaped model. tokens: length of a calibration sequence."""

    hidden: int
    intermediate: int
    layers: int
    kv_heads: int
    vocabulary: int = 8_000
    tied: bool = True
    tokens: int = 256

    def tensors(self) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        if not self.tied:
            found["lm_head.weight"] = (self.vocabulary, self.hidden)
        h, m, kv = self.hidden, self.intermediate, self.kv_heads * HEAD
        for i in range(self.layers):
            rows = {"self_attn.q_proj": (h, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h),
                    "self_attn.o_proj": (h, h), "mlp.gate_proj": (m, h), "mlp.up_proj": (m, h), "mlp.down_proj": (h, m),
                    "input_layernorm": (h,), "post_attention_layernorm": (h,)}
            found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in rows.items()}
        return found | {"model.norm.weight": (h,)}

    def build(self, folder: Path) -> None:
        """Write the model in float16 with a tokenizer of 2000 tokens."""
        folder.mkdir(parents=True)
        block = (np.random.default_rng(0).standard_normal(1 << 22, dtype=np.float32) * 0.02).astype(np.float16)
        tensors = {name: np.ones(shape, np.float16) if len(shape) == 1 else np.resize(block, shape)
                   for name, shape in self.tensors().items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": self.hidden, "head_dim": HEAD,
            "intermediate_size": self.intermediate, "num_hidden_layers": self.layers, "torch_dtype": "float16",
            "num_attention_heads": self.hidden // HEAD, "num_key_value_heads": self.kv_heads, "rms_norm_eps": 1e-6,
            "vocab_size": self.vocabulary, "max_position_embeddings": 8192, "tie_word_embeddings": self.tied,
            "rope_theta": 1e6, "bos_token_id": 0, "eos_token_id": 1}))
        tok = Tokenizer(models.BPE())
        tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        tok.train_from_iterator([TEXT], trainers.BpeTrainer(
            vocab_size=2000, special_tokens=["<s>", "</s>"], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
        tok.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}))


SHAPES = {
    "deep narrow": Shape(384, 1024, 32, 6),
    "shallow wide": Shape(1536, 4096, 2, 24),
    "large vocabulary, tied": Shape(384, 1024, 2, 6, 151_936),
    "large vocabulary, untied": Shape(384, 1024, 2, 6, 80_000, tied=False),
    "grouped queries, wide MLP": Shape(768, 5120, 2, 2),
    "long context": Shape(512, 1408, 3, 2, tokens=2048),
}
TEXT_OPTIONS = ["--calibration", "TEXT", "--samples", "4", "--seq-len", "TOKENS"]
TRAINING = ["--teacher", "MODEL", "--calibration", "TEXT", "--sampled", "0", "--seq-len", "TOKENS", "--steps", "2",
            "--held-out", "1"]
COMMANDS = {  # in this order: later ones read the results of earlier ones
    "quantize": ["quantize", "MODEL", *TEXT_OPTIONS, "-o", "QUANTIZED"],
    "budget": ["quantize", "MODEL", "--target-bpw", "6", *TEXT_OPTIONS, "-o", "OUT"],
    "prune": ["prune", "MODEL", *TEXT_OPTIONS, "-o", "OUT"],
    "prune depth": ["prune", "MODEL", "--method", "depth", "--drop", "1", *TEXT_OPTIONS, "-o", "OUT"],
    "heal": ["heal", "QUANTIZED", *TRAINING, "-o", "OUT"],
    "heal block": ["heal", "QUANTIZED", "--scope", "block", *TRAINING, "-o", "OUT"],
    "distill": ["distill", "MODEL", *TRAINING, "-o", "OUT"],
    "self": ["imatrix", "MODEL", "--samples", "4", "--seq-len", "128", "-o", "OUT.gguf"],
    "export gguf": ["export", "QUANTIZED", "-o", "SMALL.gguf"],
    "export onnx": ["export", "QUANTIZED", "--format", "onnx", "-o", "ONNX"],
    "eval gguf": ["eval", "SMALL.gguf", "--base", "MODEL", "--text", "TEXT", "--chunks", "1", "--context", "TOKENS"],
    "eval onnx": ["eval", "ONNX", "--base", "MODEL", "--text", "TEXT", "--chunks", "1", "--context", "TOKENS"],
    "eval folder": ["eval", "QUANTIZED", "--base", "MODEL", "--text", "TEXT", "--chunks", "1", "--context", "TOKENS"],
}


def words(command: str, folder: Path, shape: Shape) -> list[str]:
    """The arguments of a command in the folder of a shape."""
    names = {"MODEL": folder / "model", "QUANTIZED": folder / "quantized", "OUT": folder / "out", "TEXT": folder / "text.txt",
             "SMALL.gguf": folder / "small.gguf", "OUT.gguf": folder / "out.gguf", "ONNX": folder / "onnx",
             "TOKENS": shape.tokens}
    return [str(names.get(word, word)) for word in COMMANDS[command]] + ["--threads", "2"]


def run(arguments: list[str], folder: Path) -> tuple[int, str]:
    """Run llmc in `folder`. Returns (the process's peak of resident memory in bytes, what it printed)."""
    printed = folder / ".printed"
    with printed.open("wb") as out, (folder / ".messages").open("wb") as messages:
        child = subprocess.Popen([sys.executable, "-P", "-m", "llmc", *arguments], cwd=folder, stdout=out, stderr=messages)
        _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"llmc {' '.join(arguments)} ended with {child.returncode}:\n{(folder / '.messages').read_text()}")
    return used.ru_maxrss * 1024, printed.read_text()


def measure(command: str, folder: Path, shape: Shape) -> dict[str, Any]:
    """{'planned', 'terms', 'measured'} in bytes."""
    arguments = words(command, folder, shape)
    peak, _ = run(arguments, folder)
    for name in ("out", "out.gguf", "out.gguf.llmc.json"):
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink(missing_ok=True)
    elsewhere = [*arguments[: arguments.index("-o") + 1], str(folder / "planned"), *arguments[arguments.index("-o") + 2:]
                 ] if "-o" in arguments else arguments
    plan = json.loads(run([*elsewhere, "--dry-run", "--json"], folder)[1])
    return {"planned": plan["memory_bytes"], "terms": plan["memory"], "measured": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shape", action="append", choices=SHAPES)
    parser.add_argument("--command", action="append", choices=COMMANDS)
    parser.add_argument("--limit", type=float, default=0.20)
    args = parser.parse_args()
    rows = []
    for name in args.shape or SHAPES:
        folder, shape = args.work.resolve() / name.replace(" ", "-").replace(",", ""), SHAPES[name]
        if not (folder / "model").exists():
            with ProcessPoolExecutor(1) as apart:  # the peak of this process would count as that of its children
                apart.submit(shape.build, folder / "model").result()
        (folder / "text.txt").write_text(TEXT, encoding="utf-8")
        for command in args.command or COMMANDS:
            found = measure(command, folder, shape)
            rows.append({"shape": name, "command": command, "ratio": found["measured"] / found["planned"], **found})
            print(f"{name:<26} {command:<12} planned {found['planned'] / 1e6:>6,.0f} MB  measured "
                  f"{found['measured'] / 1e6:>6,.0f} MB  {rows[-1]['ratio']:.2f}", flush=True)
    for command in args.command or COMMANDS:
        print(f"{command}: llmc {' '.join(COMMANDS[command])} --threads 2")
    far = [r for r in rows if abs(r["ratio"] - 1) > args.limit]
    print(json.dumps({"rows": rows, "outside": len(far)}))
    sys.exit(1 if far else 0)


if __name__ == "__main__":
    main()
