"""The reference logits of an exported file: transformers runs the source model in float32, dequantized.

Embedding and lm_head have the values of the file: at few bits they alone lose more than the bounds of the check allow.
The weights of a module are read when it runs and dropped afterwards. So memory is bounded by the largest matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from llmc.errors import UserError
from llmc.formats import quantized
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.hf import load_config, load_torch_model


@torch.no_grad()
def reference_logits(ckpt: Checkpoint, ids: np.ndarray, ends: dict[str, torch.Tensor],
                     rounded: Callable[[str], torch.Tensor] | None = None,
                     inputs: Callable[[str, torch.Tensor], torch.Tensor] | None = None) -> np.ndarray:
    """ids int [n] -> float32 [n, vocab]. ends: 'embedding' and 'head' (one tensor if they are tied), float32.

    rounded: takes the module name of a float linear in the checkpoint, returns its values in the file.
    inputs: takes that name and the linear's input, returns the input as the file rounds it before the product.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = load_config(ckpt.folder)
    with init_empty_weights(include_buffers=False):
        # only eager attention computes every variant (sdpa ignores Gemma 2's soft cap)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager",
                                                 trust_remote_code=False)
    weights = _Weights(ckpt, model, ends, rounded, inputs)
    if all(weights.has(name) for name, _ in model.named_parameters()):
        for name, module in model.named_modules():
            if any(True for _ in module.parameters(recurse=False)):
                module.register_forward_pre_hook(weights.fetch(name))
                module.register_forward_hook(weights.drop)
    elif rounded is not None:
        raise UserError(f"transformers renames the tensors of {ckpt.folder}", "export it as GGUF")
    else:  # transformers renames or stacks the tensors of this architecture when it loads them, so it must load them itself
        model = load_torch_model(ckpt.folder)
        for module, end in ((model.get_output_embeddings(), "head"), (model.get_input_embeddings(), "embedding")):
            module.weight.data.copy_(with_rows(ends[end], module.weight.shape[0]))
    model.eval()
    out = model(input_ids=torch.from_numpy(np.asarray(ids, dtype=np.int64))[None], use_cache=False).logits
    return np.asarray(out[0].float().numpy())


def with_rows(matrix: torch.Tensor, rows: int) -> torch.Tensor:
    """Cut or zero-pad to `rows` rows: a file may have fewer or more padding rows than the model."""
    return nn.functional.pad(matrix[:rows], (0, 0, 0, max(0, rows - matrix.shape[0])))


def locate(ckpt: Checkpoint, linears: set[str], name: str, prefix: str) -> tuple[str, bool] | None:
    """Find a parameter of transformers' model in the checkpoint, with or without the base model's prefix.

    Returns (name, False) for a float tensor, (name of the linear, True) for a quantized one, None if it is not there."""
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        if candidate in ckpt:
            return candidate, False
        if (linear := candidate.removesuffix(".weight")) in linears:
            return linear, True
    return None


class _Weights:
    """Reads the parameters of a module of `model` from a float or quantized checkpoint."""

    def __init__(self, ckpt: Checkpoint, model: nn.Module, ends: dict[str, torch.Tensor],
                 rounded: Callable[[str], torch.Tensor] | None,
                 inputs: Callable[[str, torch.Tensor], torch.Tensor] | None) -> None:
        self.ckpt, self.rounded, self.inputs = ckpt, rounded, inputs
        self.linears = set(quantized.linears(ckpt))
        self.prefix = f"{getattr(model, 'base_model_prefix', '')}."
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
        names = {id(m): n for n, m in model.named_modules()}
        self.head, self.embedding = names[id(head)], names[id(embedding)]
        self.ends = {f"{self.embedding}.weight": ends["embedding"], f"{self.head}.weight": ends["head"]}

    def has(self, name: str) -> bool:
        return self._locate(name) is not None

    def _locate(self, name: str) -> tuple[str, bool] | None:
        if found := locate(self.ckpt, self.linears, name, self.prefix):
            return found
        # a tied head has no tensor; the planner has checked that it is tied
        return self._locate(f"{self.embedding}.weight") if name == f"{self.head}.weight" else None

    def fetch(self, module_name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> Any:
            for name, p in list(module.named_parameters(recurse=False)):
                value = self._read(f"{module_name}.{name}", module)
                if value.shape != p.shape:
                    raise UserError(f"{module_name}.{name} has shape {list(value.shape)}, config.json says "
                                    f"{list(p.shape)}", "the checkpoint and its config.json do not match")
                setattr(module, name, nn.Parameter(value, requires_grad=False))
            return args if self.inputs is None else self._rounded_input(module_name, module, args)
        return hook

    def _rounded_input(self, module_name: str, module: nn.Module, args: Any) -> Any:
        found = self._locate(f"{module_name}.weight") if isinstance(module, nn.Linear) and module_name != self.head else None
        if found is None or found[1] or self.inputs is None:
            return args
        return (self.inputs(found[0].removesuffix(".weight"), args[0]), *args[1:])

    @staticmethod
    def drop(module: nn.Module, _args: Any, _out: Any) -> None:
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(p.data.to("meta"), requires_grad=False))

    def _read(self, name: str, module: nn.Module) -> torch.Tensor:
        from transformers.pytorch_utils import Conv1D

        if name in self.ends:
            return with_rows(self.ends[name], module.get_parameter("weight").shape[0])
        found = self._locate(name)
        assert found is not None
        stored, is_codes = found
        if not is_codes and self.rounded is not None and isinstance(module, nn.Linear) and name.endswith(".weight"):
            return self.rounded(stored.removesuffix(".weight"))
        if not is_codes:
            return self.ckpt.tensor(stored).to(torch.float32)
        w = quantized.read(self.ckpt, stored).dequantize()
        return w.t().contiguous() if isinstance(module, Conv1D) else w
