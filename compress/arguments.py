"""What a model hands to its decoder layers beside the hidden states: masks, positions, rotary tables.

They are recorded once and used for every batch. That is right only if they do not depend on the text. So they are recorded
for one sequence and for two other ones, and compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Repeated:
    """A tensor whose first axis grows with the batch: it holds `once` for each sequence."""

    once: torch.Tensor

    def of(self, n: int) -> torch.Tensor:
        rest = self.once.shape[1:]
        return self.once.expand(n, *rest) if len(self.once) == 1 else self.once.repeat(n, *[1] * len(rest))


class TextDependent(Exception):  # noqa: N818 - its message is the name of the argument
    """An argument has other values for another text."""


@dataclass(frozen=True)
class LayerArguments:
    """The keyword arguments of one layer. values: tensors that serve every batch, and `Repeated` ones."""

    values: dict[str, Any]

    @classmethod
    def of_two_runs(cls, one: dict[str, Any], two: dict[str, Any]) -> LayerArguments:
        """one: recorded for one sequence; two: for a batch of two other sequences. Raises TextDependent."""
        return cls({name: _common(name, value, two.get(name)) for name, value in one.items()})

    def of(self, n: int) -> dict[str, Any]:
        """The arguments for a batch of `n` sequences."""
        return {name: _sized(value, n) for name, value in self.values.items()}


def _common(name: str, one: Any, two: Any) -> Any:
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        if torch.equal(one, two):
            return one
        if one.ndim and torch.equal(torch.cat([one, one]), two):
            return Repeated(one)
        raise TextDependent(name)
    if isinstance(one, tuple) and isinstance(two, tuple) and len(one) == len(two):
        return tuple(_common(name, a, b) for a, b in zip(one, two, strict=True))
    if isinstance(one, torch.Tensor | tuple | list | dict) or (one is None) != (two is None):
        raise TextDependent(name)  # lists and dicts carry values from layer to layer
    return one


def _sized(value: Any, n: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_sized(v, n) for v in value)
    return value.of(n) if isinstance(value, Repeated) else value
