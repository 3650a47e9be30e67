"""How a transform reads and changes linears: of a layer's experts, one has its weights at a time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from torch import nn

# (layer, name of a linear in it) -> a context in which the linear has its weights. One for reading, one for changing.
Opening = Callable[[nn.Module, str], AbstractContextManager[nn.Module]]


def loaded(layer: nn.Module, name: str) -> AbstractContextManager[nn.Module]:
    """For a layer that has all its weights."""
    return nullcontext(layer.get_submodule(name))
