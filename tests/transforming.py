"""What the tests of transforms share: models in float64 and their logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llmc.formats.hf import load_torch_model

IDS = torch.randint(2, 512, (2, 48), generator=torch.Generator().manual_seed(3))
LEFT_ALONE = {"gpt2": "gelu_new", "gpt_neox": "gelu"}  # MLPs whose activation does not commute with a scaling


def load(folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    model = load_torch_model(folder, dtype=dtype)
    model.config._experts_implementation = "eager"  # the fast form of experts has no float64
    return model


@torch.no_grad()
def logits(folder: Path, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return load(folder, dtype)(IDS).logits


def same(ours: torch.Tensor, theirs: torch.Tensor, bound: float) -> None:
    assert float((ours - theirs).abs().max()) < bound * float(theirs.abs().max())


def layers_of(model: Any) -> Any:
    return next(m for n, m in model.named_modules() if n.endswith((".layers", ".h")))
