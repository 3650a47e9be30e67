"""Float tensors that a folder stores as codes with scales: FP8 (fp8.py) and the experts of MXFP4 (mxfp4.py).

A Checkpoint gives their values, one tensor at a time, under the names that the model knows. So every command reads such a
folder as a float model, and says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


Index = int | slice | None  # along the first axis; None: all of it


@dataclass(frozen=True)
class Coded:
    """A float tensor that is stored as codes. parts: the names of its stored tensors.  type: of the codes, for reports.
    shape: of the values.  dtype: of the values, by its safetensors name.  values: reads them, or a slice of them."""

    parts: tuple[str, ...]
    type: str
    shape: tuple[int, ...]
    dtype: str
    values: Callable[[Index], torch.Tensor] = field(repr=False)


@dataclass(frozen=True)
class Decoded:
    """tensors: {name: how it is stored}.  unused: stored tensors that do not belong to weights (scales of activations).
    note: for the user, one sentence."""

    tensors: dict[str, Coded] = field(default_factory=dict)
    unused: frozenset[str] = frozenset()
    note: str = ""

    def parts(self) -> frozenset[str]:
        """The stored tensors that are read through others, or not at all."""
        return self.unused | {part for coded in self.tensors.values() for part in coded.parts}
