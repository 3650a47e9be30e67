"""The linears of a transformers model: nn.Linear, and transformers' Conv1D (GPT-2), which stores its weight transposed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from llmc.errors import UserError


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def get_weight(linear: nn.Module) -> torch.Tensor:
    """The weight as [out, in] (a view). linear: a linear, or a router, whose weight has this form too."""
    weight = linear.weight.data
    assert isinstance(weight, torch.Tensor)
    return weight if isinstance(linear, nn.Linear) or not is_linear(linear) else weight.t()


def set_weight(linear: nn.Module, weight: torch.Tensor) -> None:
    """Replace the weight by `weight` [out, in]."""
    get_weight(linear).copy_(weight)


def find_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """Returns (name, module list) of the decoder layers: the module list with linears that has as many members as the text
    config says. If several have (vision layers), the one in the module with the text config. UserError if there is none."""
    text = model.config.get_text_config()
    count = getattr(text, "num_hidden_layers", None)
    lists = [(n, m) for n, m in model.named_modules()
             if isinstance(m, nn.ModuleList) and len(m) == count and any(is_linear(x) for x in m[0].modules())]
    if not lists:
        raise UserError(f"{type(model).__name__} has no list of {count} decoder layers", "llmc needs a decoder-only model")

    def of_text(name: str) -> bool:
        """Whether the nearest module above with a config has the text config."""
        above = [model, *(model.get_submodule(name[:i]) for i, c in enumerate(name) if c == ".")]
        config = next(m.config for m in reversed(above) if hasattr(m, "config"))
        return bool(config.get_text_config().model_type == text.model_type)

    return next((pair for pair in lists if of_text(pair[0])), lists[0])


def around(model: Any, layers: str) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every module outside the decoder layers that a text uses and that has parameters or buffers itself.
    Of a multimodal model these are the head and the modules of the part with the decoder layers.

    layers: the name of the list of decoder layers.
    """
    is_text = model.config.get_text_config() is model.config
    part = "" if is_text else layers.rpartition(".")[0] + "."
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if (module._parameters or module._buffers) and not name.startswith(layers + ".") and (
                module is head or name.startswith(part)):
            yield name, module


def drop_parts(model: Any, layers: str) -> None:
    """Take the parameters of the parts of a multimodal model that a text does not use out of it.

    They have no values, and code that asks where the first parameter lies would send a text there.
    layers: the name of the list of decoder layers."""
    used = {id(m) for _, m in around(model, layers)} | {id(m) for m in model.get_submodule(layers).modules()}
    for module in model.modules():
        if id(module) not in used:
            module._parameters.clear()
