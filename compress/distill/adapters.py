"""Low-rank adapters instead of full weights, through peft (Hu et al., "LoRA", 2021, arXiv:2106.09685).

An adapter adds B A x * (alpha / rank) to the output of a frozen linear. B starts at zero. At the end B A * (alpha / rank) is
added to the weight.
"""

from __future__ import annotations

from typing import Any

import torch

from llmc.errors import UserError
from llmc.formats.linears import find_layers, is_linear

SCALE = 2  # alpha / rank


def check_peft() -> None:
    """Raise UserError if the package peft is not installed."""
    try:
        import peft  # noqa: F401
    except ModuleNotFoundError as e:
        raise UserError("--lora needs the package `peft`",
                        "pip install 'llmc-toolkit[distill]', or train full weights") from e


def add_adapters(model: Any, rank: int, seed: int) -> None:
    """Freeze the model and add an adapter to every linear of its decoder layers."""
    from peft import LoraConfig, inject_adapter_in_model

    prefix, layers = find_layers(model)
    names = [f"{prefix}.{i}.{name}" for i, layer in enumerate(layers) for name, m in layer.named_modules() if is_linear(m)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=names), model)


def merge_adapters(model: Any) -> None:
    """Add every adapter to its weight and restore the original modules."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = [(name, m) for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    for name, module in found:
        module.merge()
        model.set_submodule(name, module.get_base_layer())
