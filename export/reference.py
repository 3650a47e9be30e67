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
from llmc.formats.names import Names


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
    if all(weights.names.locate(name) for name, _ in model.named_parameters()):
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


class _Weights:
    """Reads the parameters of a module of `model` from a float or quantized checkpoint."""

    def __init__(self, ckpt: Checkpoint, model: nn.Module, ends: dict[str, torch.Tensor],
                 rounded: Callable[[str], torch.Tensor] | None,
                 inputs: Callable[[str, torch.Tensor], torch.Tensor] | None) -> None:
        self.ckpt, self.rounded, self.inputs = ckpt, rounded, inputs
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
        names = {id(m): n for n, m in model.named_modules()}
        self.head, parameters = names[id(head)], (f"{names[id(head)]}.weight", f"{names[id(embedding)]}.weight")
        self.ends = {parameters[1]: ends["embedding"], parameters[0]: ends["head"]}
        # a tied head has no tensor; the planner has checked that it is tied
        self.names = Names.of(ckpt, model, quantized.linears(ckpt), dict([parameters]))

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
        rounds = isinstance(module, nn.Linear) and module_name != self.head
        found = self.names.locate(f"{module_name}.weight") if rounds else None
        if found is None or found.is_codes or self.inputs is None:
            return args
        return (self.inputs(found.name.removesuffix(".weight"), args[0]), *args[1:])

    @staticmethod
    def drop(module: nn.Module, _args: Any, _out: Any) -> None:
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(p.data.to("meta"), requires_grad=False))

    def _read(self, name: str, module: nn.Module) -> torch.Tensor:
        from transformers.pytorch_utils import Conv1D

        if name in self.ends:
            return with_rows(self.ends[name], module.get_parameter("weight").shape[0])
        found = self.names.locate(name)
        assert found is not None
        stored, is_codes = found
        if not is_codes and self.rounded is not None and isinstance(module, nn.Linear) and name.endswith(".weight"):
            return self.rounded(stored.removesuffix(".weight"))
        if not is_codes:
            return self.ckpt.tensor(stored).to(torch.float32)
        w = quantized.read(self.ckpt, stored).dequantize()
        return w.t().contiguous() if isinstance(module, Conv1D) else w
