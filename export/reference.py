"""The reference logits of an exported file: transformers runs the source model in float32, dequantized.

Embedding and lm_head have the values of the file: at few bits they alone lose more than the bounds of the check allow.
The weights of a decoder layer are read when it runs and dropped afterwards, those of an expert likewise. So memory is bounded
by the largest layer. An operation on a weight that was not read is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from llmc.formats.checkpoint import Checkpoint
from llmc.formats.hf import empty_model, load_config
from llmc.formats.linears import around, drop_parts, find_layers
from llmc.formats.weights import NoMeta, Weights


@torch.no_grad()
def reference_logits(ckpt: Checkpoint, ids: np.ndarray, ends: dict[str, torch.Tensor],
                     rounded: Callable[[str], torch.Tensor] | None = None,
                     inputs: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
                     config: Any = None) -> np.ndarray:
    """ids int [n] -> float32 [n, vocab]. ends: 'embedding' and 'head' (one tensor if they are tied), float32.

    config: the transformers config to run the weights with; None: that of the checkpoint.
    rounded: takes the module name of a float linear in the checkpoint, returns its values in the file.
    inputs: takes that name and the linear's input, returns the input as the file rounds it before the product.
    """
    # only eager attention computes every variant (sdpa ignores Gemma 2's soft cap)
    model = empty_model(config or load_config(ckpt.folder), attn_implementation="eager")
    values = _Values(ckpt, model, ends, rounded, inputs)
    weights = values.weights
    prefix, layers = find_layers(model)
    weights.unfuse(layers, prefix)
    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda m, _args, name=f"{prefix}.{index}": weights.load(m, name))
        layer.register_forward_hook(lambda m, _args, _out: weights.free(m))
    if inputs is not None:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(values.rounding(name))
    for name, module in around(model, prefix):
        weights.load(module, name, children=False)
    drop_parts(model, prefix)
    with NoMeta():
        out = model(input_ids=torch.from_numpy(np.asarray(ids, dtype=np.int64))[None], use_cache=False).logits
    return np.asarray(out[0].float().numpy())


def with_rows(matrix: torch.Tensor, rows: int) -> torch.Tensor:
    """Cut or zero-pad to `rows` rows: a file may have fewer or more padding rows than the model."""
    return nn.functional.pad(matrix[:rows], (0, 0, 0, max(0, rows - matrix.shape[0])))


class _Values:
    """What the file holds in place of the checkpoint's values."""

    def __init__(self, ckpt: Checkpoint, model: nn.Module, ends: dict[str, torch.Tensor],
                 rounded: Callable[[str], torch.Tensor] | None,
                 inputs: Callable[[str, torch.Tensor], torch.Tensor] | None) -> None:
        self.rounded, self.inputs = rounded, inputs
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
        names = {id(m): n for n, m in model.named_modules()}
        self.head = names[id(head)]
        head_weight, table = f"{self.head}.weight", f"{names[id(embedding)]}.weight"
        self.ends = {table: with_rows(ends["embedding"], embedding.weight.shape[0]),
                     head_weight: with_rows(ends["head"], head.weight.shape[0])}
        # a tied head has no tensor; the planner has checked that it is tied
        self.weights = Weights(ckpt, model, values=self.value, tied={head_weight: table})

    def value(self, name: str, module: nn.Module) -> torch.Tensor | None:
        """The value of a parameter in the file; None for the checkpoint's."""
        if name in self.ends:
            return self.ends[name]
        if self.rounded is None or not isinstance(module, nn.Linear) or not name.endswith(".weight"):
            return None
        found = self.weights.names.locate(name)
        if found is None or found.is_codes:
            return None
        return self.rounded(self.weights.names.stored(name).removesuffix(".weight"))  # of one expert, if it is one

    def rounding(self, module_name: str) -> Callable[..., Any]:
        """A hook that rounds a linear's input."""
        def hook(_module: nn.Module, args: Any) -> Any:
            found = self.weights.names.locate(f"{module_name}.weight") if module_name != self.head else None
            if found is None or found.is_codes or self.inputs is None:
                return args
            return (self.inputs(found.name.removesuffix(".weight"), args[0]), *args[1:])
        return hook
