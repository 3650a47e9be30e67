"""The models in training: load the teacher, and run body and head separately."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from llmc.formats.hf import load_torch_model
from llmc.formats.linears import find_layers, is_linear


def load_teacher(folder: Path, dtype: torch.dtype) -> Any:
    """The float model, frozen. As in the student, the linears of its body and the head are `dtype`, all else is float32."""
    model = load_torch_model(folder).requires_grad_(False)
    for module in getattr(model, model.base_model_prefix).modules():
        if is_linear(module):
            module.to(dtype)
    cast_head(model, dtype)
    return model


def cast_head(model: Any, dtype: torch.dtype) -> None:
    """Replace the frozen head by a copy in `dtype`, so that it is cast once and not at each use. A tied embedding does not
    change."""
    head = model.get_output_embeddings()
    if type(head) is nn.Linear and head.weight.dtype != dtype:
        cast = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
        cast.weight = nn.Parameter(head.weight.detach().to(dtype), requires_grad=False)
        cast.bias = None if head.bias is None else nn.Parameter(head.bias.detach().to(dtype), requires_grad=False)
        model.set_output_embeddings(cast)


def checkpoint_layers(model: Any) -> None:
    """Make each decoder layer store only its input and run again in the backward pass (Chen et al., 2016, arXiv:1604.06174).
    (transformers' own switch works only in training mode, where dropout is on.)"""
    _, layers = find_layers(model)
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)  # type: ignore[method-assign]


def hidden_states(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The input of the head: [n, seq_len, hidden], after the last norm."""
    states: torch.Tensor = getattr(model, model.base_model_prefix)(input_ids=ids, use_cache=False).last_hidden_state
    return states


@contextmanager
def head_of(model: Any) -> Iterator[Any]:
    """Inside, a function from hidden states [1, n, hidden] to logits [n, vocab]. It runs the model itself, with its soft caps
    and scalings, and with a body that returns the given states."""
    from transformers.modeling_outputs import BaseModelOutput

    class Given(BaseModelOutput):  # type: ignore[misc]
        """What the body returns. Each model asks for other members (router_logits, rope_deltas): they are None."""

        def __getattr__(self, name: str) -> None:
            if name.startswith("__"):
                raise AttributeError(name)

    body = getattr(model, model.base_model_prefix)
    forward = body.forward
    given: list[torch.Tensor] = []
    body.forward = lambda *_args, **_kwargs: Given(last_hidden_state=given[-1])
    nothing = torch.zeros(1, 1, dtype=torch.int64, device=next(model.parameters()).device)

    def head(states: torch.Tensor) -> torch.Tensor:
        given.append(states)
        try:
            logits: torch.Tensor = model(input_ids=nothing, use_cache=False).logits[0]
        finally:
            given.pop()
        return logits

    try:
        yield head
    finally:
        body.forward = forward
