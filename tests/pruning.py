"""What the tests of pruning share: a short calibration, logits of whole models, where the zeros are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import corpus, tokenizer
from torch import nn
from transformers import AutoModelForCausalLM

import llmc
from llmc.compress.skeleton import Skeleton, linears_of
from llmc.formats.checkpoint import Checkpoint


def prune(base: Path, text: Path, out: Path | None = None, **options: Any) -> dict[str, Any]:
    return llmc.prune(base, **{"calibration": str(text), "samples": 16, "seq_len": 64, "threads": 2, "out": out, **options})


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def some_ids() -> torch.Tensor:
    return tokenizer()(corpus()[100_000:104_000], return_tensors="pt").input_ids[:, :192].view(2, 96)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(some_ids()).logits
    return found


def zeros(folder: Path) -> dict[str, torch.Tensor]:
    """Where the linears of the decoder layers are zero, [out, in], by module name."""
    checkpoint = Checkpoint.open(folder)
    skeleton = Skeleton(checkpoint, "cpu")
    found = {}
    for _, name, module in linears_of(skeleton):
        stored = str(skeleton.names.find(f"{name}.weight"))
        weight = checkpoint.tensor(stored)
        found[stored.removesuffix(".weight")] = (weight if isinstance(module, nn.Linear) else weight.t()) == 0
    return found
