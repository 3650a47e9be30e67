"""A model without weights in memory: built on the meta device, and filled one decoder layer at a time.

This module does not depend on the architecture. The decoder layers are the module list that is as long as the text config
says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llmc.errors import UserError
from llmc.formats import contents, quantized
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.ends import Ends, ends_of
from llmc.formats.hf import load_config
from llmc.formats.layouts import listed
from llmc.formats.names import Names, missing


@dataclass(frozen=True)
class LinearGroup:
    """Linears (names inside the layer) that read the same input of width `in_features`, in the order in which they run."""

    names: tuple[str, ...]
    in_features: int


EXPERTS = re.compile(r"(?:^|[._])(?:experts?|moe)(?:[._]|$)")  # in the names of a mixture of experts


class StopForward(Exception):  # noqa: N818 - not an error
    """Raised by a hook to end a forward pass when the rest is not needed."""


def is_linear(module: nn.Module) -> bool:
    """Whether a module is an nn.Linear, or transformers' Conv1D (GPT-2), which stores its weight transposed."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def get_weight(linear: nn.Module) -> torch.Tensor:
    """The weight as [out, in] (a view)."""
    weight = linear.weight.data
    assert isinstance(weight, torch.Tensor)
    return weight if isinstance(linear, nn.Linear) else weight.t()


def set_weight(linear: nn.Module, weight: torch.Tensor) -> None:
    """Replace the weight by `weight` [out, in]."""
    get_weight(linear).copy_(weight)


class Skeleton:
    """The model of a checkpoint on the meta device. The caller loads and frees its parts."""

    def __init__(self, checkpoint: Checkpoint, device: str) -> None:
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM

        self.checkpoint, self.device = checkpoint, torch.device(device)
        folder = str(checkpoint.folder)
        try:
            self.config = load_config(checkpoint.folder)
            with init_empty_weights(include_buffers=False):
                self.model = AutoModelForCausalLM.from_config(
                    self.config, dtype=torch.float32, trust_remote_code=False)
        except (ValueError, KeyError, ImportError) as e:
            kind = checkpoint.config.get("model_type", "unknown")
            raise UserError(f"transformers cannot build the architecture {kind!r} of {folder}: {str(e).splitlines()[0]}",
                            "llmc needs a causal language model that transformers knows without remote code") from e
        self.model.eval()
        self.layers_name, self.layers = find_layers(self.model)
        self.kept: frozenset[str] = frozenset()  # linears that no pass changes (coverage.py)
        linears = quantized.linears(checkpoint)
        self.names = Names.of(checkpoint, self.model, linears)
        self._check_layers()
        self.ends: Ends = ends_of(checkpoint, self.model, self.names)[0]
        self._check_unread({part for linear in linears for part in quantized.parts(linear)})

    def _check_layers(self) -> None:
        """Raise UserError if the checkpoint lacks a parameter of a decoder layer, and say what kind of model it is."""
        folder, names = self.checkpoint.folder, self.checkpoint.names()
        lacking = [f"{self.layers_name}.{n}" for n, _ in self.layers.named_parameters()
                   if self.names.locate(f"{self.layers_name}.{n}") is None]
        if not lacking:
            return
        if experts := [n for n in names if EXPERTS.search(n)]:
            share = sum(self.checkpoint.nbytes(n) for n in experts) / sum(map(self.checkpoint.nbytes, names))
            raise UserError(f"{folder} is a mixture of experts, which llmc cannot change yet: {len(experts)} tensors of "
                            f"experts ({listed(experts)}) are {100 * share:.1f} % of its bytes",
                            "give a dense model; `llmc eval` runs this one, and llama.cpp's tools convert and quantize it")
        kind = (self.checkpoint.config.get("architectures") or [""])[0]
        if str(kind).endswith("ForConditionalGeneration") or "vision_config" in self.checkpoint.config:
            raise UserError(f"{folder} is a multimodal model ({kind}), and its language model has other names in the files "
                            f"(there is no {lacking[0]})",
                            "give its language model as a folder of its own (the text-only checkpoint, or save "
                            "`model.language_model` with its head by `save_pretrained`)")
        raise missing(folder, *lacking)

    def _check_unread(self, codes: set[str]) -> None:
        known = {name for name, _ in self.model.named_buffers()}
        unread = [n for n in self.checkpoint.names() if n not in codes and n != self.ends.head and n not in known
                  and self.names.find_own(n) is None]
        contents.check_unread(self.checkpoint, unread, "are left as they are")

    def load(self, module: nn.Module, prefix: str) -> None:
        """Fill a module's parameters and persistent buffers from the checkpoint, in float32.

        Embeddings keep their stored dtype, because they can be gigabytes; a hook casts their output to float32. UserError if
        a tensor is missing or has another shape than in config.json.
        """
        for path, sub in module.named_modules():
            here = f"{prefix}.{path}".strip(".")
            embedding = isinstance(sub, nn.Embedding)
            for name, _ in [*sub.named_parameters(recurse=False), *sub.named_buffers(recurse=False)]:
                full = f"{here}.{name}"
                stored = self.names.find(full)
                if stored is None:
                    if name in sub._buffers:  # computed when the module is built
                        sub._buffers[name] = sub._buffers[name].to(self.device)  # type: ignore[union-attr]
                        continue
                    raise missing(self.checkpoint.folder, full)
                value = self.checkpoint.tensor(stored)
                if value.is_floating_point() and not embedding:
                    value = value.to(torch.float32)
                value = value.to(self.device)
                if name in sub._buffers:
                    sub._buffers[name] = value
                    continue
                expected = sub._parameters[name]
                if expected is not None and expected.shape != value.shape:
                    raise UserError(f"{stored} has shape {list(value.shape)}, config.json says {list(expected.shape)}",
                                    "the checkpoint and its config.json do not belong together")
                sub._parameters[name] = nn.Parameter(value, requires_grad=False)
            if embedding and not sub._forward_hooks:
                sub.register_forward_hook(lambda _m, _args, out: out.float())

    @staticmethod
    def free(module: nn.Module) -> None:
        """Move a module's parameters back to the meta device."""
        for sub in module.modules():
            for name, p in sub._parameters.items():
                if p is not None and p.device.type != "meta":
                    sub._parameters[name] = nn.Parameter(p.data.to("meta"), requires_grad=False)

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Inside, one decoder layer has its weights. They are freed at the end."""
        layer = self.layers[index]
        self.load(layer, self.layer_name(index))
        try:
            yield layer
        finally:
            self.free(layer)

    def layer_name(self, index: int) -> str:
        return f"{self.layers_name}.{index}"

    def linears(self, index: int) -> dict[str, nn.Module]:
        """{name inside the layer: linear} of a decoder layer."""
        return {n: m for n, m in self.layers[index].named_modules() if is_linear(m)}

    def leave(self) -> None:
        """Free the modules outside the layers (entering.py loads them)."""
        for part, _ in self.outside():
            self.free(part)

    def outside(self) -> list[tuple[nn.Module, str]]:
        """(module, name) of every module outside the decoder layers and the head that has parameters or buffers itself."""
        head = self.model.get_output_embeddings()
        found = []
        for name, module in self.model.named_modules():
            inside = name.startswith(self.layers_name + ".") or module is head
            if not inside and (module._parameters or module._buffers):
                found.append((module, name))
        return found


def find_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """Returns (name, module list) of the decoder layers: the module list with linears that has as many members as the text
    config says. If several have (vision layers), the one in the module with the text config. UserError if there is none."""
    text = model.config.get_text_config()
    count = getattr(text, "num_hidden_layers", None)
    lists = [(n, m) for n, m in model.named_modules()
             if isinstance(m, nn.ModuleList) and len(m) == count and any(is_linear(x) for x in m[0].modules())]
    if not lists:
        raise UserError(f"{type(model).__name__} has no list of {count} decoder layers", "llmc needs a decoder-only model")

    def of_text(name: str) -> bool:
        """Whether the nearest module above with a config has the text config."""
        above = [model, *(model.get_submodule(name[:i]) for i, c in enumerate(name) if c == ".")]
        config = next(m.config for m in reversed(above) if hasattr(m, "config"))
        return bool(config.get_text_config().model_type == text.model_type)

    return next((pair for pair in lists if of_text(pair[0])), lists[0])


def linears_of(skeleton: Skeleton) -> Iterator[tuple[int, str, torch.nn.Module]]:
    """(layer index, name in the model, module) of every linear in the decoder layers, without those that are kept."""
    for index in range(len(skeleton.layers)):
        for name, module in skeleton.linears(index).items():
            if (full := f"{skeleton.layer_name(index)}.{name}") not in skeleton.kept:
                yield index, full, module
