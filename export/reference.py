"""The logits that the file must give: the source model run by transformers in float32, dequantized where it has codes, with
embedding and head as the file has them (a type of few bits loses more there than the bounds of the check allow).

Every module's weights are read when it runs and dropped afterwards, so a model of any size needs the memory of its
largest matrix only.
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
def reference_logits(ckpt: Checkpoint, ids: np.ndarray, tables: dict[str, torch.Tensor],
                     rounded: Callable[[str], torch.Tensor] | None = None,
                     inputs: Callable[[str, torch.Tensor], torch.Tensor] | None = None) -> np.ndarray:
    """ids int [n] -> float32 [n, vocab]. tables: 'embedding' and 'head' (the same where they are tied), float32.

    rounded: gives a linear that the checkpoint holds as floats, by its module's name in the checkpoint, as the file has it.
    inputs: gives what such a linear makes of its input before the product.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = load_config(ckpt.folder)
    with init_empty_weights(include_buffers=False):
        # only the eager attention computes every variant (Gemma 2's soft cap is ignored by sdpa)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager",
                                                 trust_remote_code=False)
    weights = _Weights(ckpt, model, tables, rounded, inputs)
    if all(weights.names.locate(name) for name, _ in model.named_parameters()):
        for name, module in model.named_modules():
            if any(True for _ in module.parameters(recurse=False)):
                module.register_forward_pre_hook(weights.fetch(name))
                module.register_forward_hook(weights.drop)
    elif rounded is not None:
        raise UserError(f"transformers renames the tensors of {ckpt.folder}", "export it as GGUF")
    else:  # transformers renames or stacks this architecture's tensors when it loads them: leave it to that
        model = load_torch_model(ckpt.folder)
        for module, table in ((model.get_output_embeddings(), "head"), (model.get_input_embeddings(), "embedding")):
            module.weight.data.copy_(with_rows(tables[table], module.weight.shape[0]))
    model.eval()
    out = model(input_ids=torch.from_numpy(np.asarray(ids, dtype=np.int64))[None], use_cache=False).logits
    return np.asarray(out[0].float().numpy())


def with_rows(table: torch.Tensor, rows: int) -> torch.Tensor:
    """As many rows as the model has: a file may leave out padding, or pad."""
    return nn.functional.pad(table[:rows], (0, 0, 0, max(0, rows - table.shape[0])))


class _Weights:
    """Reads the parameters of a module of `model` from a float or quantized checkpoint."""

    def __init__(self, ckpt: Checkpoint, model: nn.Module, tables: dict[str, torch.Tensor],
                 rounded: Callable[[str], torch.Tensor] | None,
                 inputs: Callable[[str, torch.Tensor], torch.Tensor] | None) -> None:
        self.ckpt, self.rounded, self.inputs = ckpt, rounded, inputs
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
        names = {id(m): n for n, m in model.named_modules()}
        self.head, ends = names[id(head)], (f"{names[id(head)]}.weight", f"{names[id(embedding)]}.weight")
        self.tables = {ends[1]: tables["embedding"], ends[0]: tables["head"]}
        # a tied head has no tensor; the planner has made sure that it is tied
        self.names = Names.of(ckpt, model, quantized.linears(ckpt), dict([ends]))

    def fetch(self, module_name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> Any:
            for name, p in list(module.named_parameters(recurse=False)):
                value = self._read(f"{module_name}.{name}", module)
                if value.shape != p.shape:
                    raise UserError(f"{module_name}.{name} has shape {list(value.shape)}, config.json says "
                                    f"{list(p.shape)}", "the checkpoint and its config.json do not belong together")
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

        if name in self.tables:
            return with_rows(self.tables[name], module.get_parameter("weight").shape[0])
        found = self.names.locate(name)
        assert found is not None
        stored, is_codes = found
        if not is_codes and self.rounded is not None and isinstance(module, nn.Linear) and name.endswith(".weight"):
            return self.rounded(stored.removesuffix(".weight"))
        if not is_codes:
            return self.ckpt.tensor(stored).to(torch.float32)
        w = quantized.read(self.ckpt, stored).dequantize()
        return w.t().contiguous() if isinstance(module, Conv1D) else w
