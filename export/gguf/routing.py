"""How a mixture of experts makes scores of its router's outputs, found by running transformers' code without weights.

llama.cpp needs to know it. The config.json files of the hub say it; transformers 5 leaves it out of those that it writes,
since its code for an architecture has one way.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from llmc.formats.hf import empty_model
from llmc.formats.mixture import count_of, is_fused

TOKENS = 3
SCORES: dict[Any, str] = {
    **dict.fromkeys((torch.sigmoid, torch.Tensor.sigmoid, torch.nn.functional.sigmoid), "sigmoid"),
    **dict.fromkeys((torch.softmax, torch.Tensor.softmax, torch.nn.functional.softmax), "softmax"),
}


def scoring(config: Any) -> str:
    """'sigmoid' or 'softmax' if one of them, and not both, is taken of a number for each expert; '' for all other models.

    config: transformers' reading of config.json."""
    model = empty_model(config).to("meta")
    found = next(((name, m) for name, m in model.named_modules() if is_fused(m)), None)
    if found is None:
        return ""
    name, experts = found
    states = torch.empty((1, TOKENS, config.get_text_config().hidden_size), device="meta")
    scores = _Scores(count_of(experts))
    # experts are chosen by values, which there are none of; some layers take more arguments
    with torch.no_grad(), suppress(RuntimeError, NotImplementedError, TypeError), scores:
        model.get_submodule(name.rpartition(".")[0])(states)
    return scores.found.pop() if len(scores.found) == 1 else ""


class _Scores(TorchFunctionMode):
    """Within this context, notes the functions of SCORES that are given as many numbers as there are experts."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count, self.found = count, set[str]()

    def __torch_function__(self, func: Any, types: Iterable[Any], args: Any = (), kwargs: Any = None) -> Any:
        if func in SCORES and args and args[0].shape[-1] == self.count:
            self.found.add(SCORES[func])
        return func(*args, **kwargs or {})
