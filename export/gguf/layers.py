"""The comparison of a model layer by layer: each layer of torch gets the states that llama.cpp's layer got.

In a deep quantized model one rounding that falls the other way changes all layers above it, until the whole differs by some
percent, in which a wrong layout can hide. Inside one layer such differences stay small.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch.nn.modules.module import register_module_forward_hook

PREFIX = "l_out-"  # llama.cpp's name of a layer's output, before the layer's number
EXPERTS = "ffn_moe_argsort-"  # of the experts by their scores, int32 [tokens, experts]


def in_order(states: dict[str, list[np.ndarray]], prefix: str) -> list[np.ndarray]:
    """What llama.cpp gave under the names prefix + number, in the order of the numbers; each in one axis."""
    names = [name for name in states if name.removeprefix(prefix).isdigit()]
    return [np.concatenate(states[name]) for name in sorted(names, key=lambda n: int(n.removeprefix(prefix)))]


class Layers:
    """Within this context, the output of each decoder layer of torch is compared with llama.cpp's, and replaced by it.

    errors: of each layer, the RMS of the difference / the RMS of what the layer adds to its input.
    states: {PREFIX + number: parts of float32 [tokens, hidden], in one axis}, as llama.cpp gave them.
    """

    def __init__(self, states: dict[str, list[np.ndarray]]) -> None:
        self.states = in_order(states, PREFIX)
        self.errors: list[float] = []
        self.strange = False

    @property
    def comparable(self) -> bool:
        """Whether both sides have the same layers."""
        return not self.strange and 0 < len(self.errors) == len(self.states)

    def __enter__(self) -> Layers:
        self.handle = register_module_forward_hook(self._compare, with_kwargs=True)  # type: ignore[arg-type]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.handle.remove()

    def _compare(self, module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        from transformers.modeling_layers import GradientCheckpointingLayer

        if not isinstance(module, GradientCheckpointingLayer):  # the base of all decoder layers of transformers
            return None
        before = args[0] if args else kwargs.get("hidden_states")
        after = output[0] if isinstance(output, tuple) else output
        at = len(self.errors)
        fits = isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor) and before.shape == after.shape
        if not fits or at >= len(self.states) or self.states[at].size != after.numel():
            self.strange = True
            return None
        theirs = torch.from_numpy(self.states[at]).view(after.shape)
        self.errors.append(float(((after - theirs).square().sum() / (after - before).square().sum()).sqrt()))
        return (theirs, *output[1:]) if isinstance(output, tuple) else theirs
