"""What transformers renames, merges and splits when it loads a checkpoint.

Since version 5 the names in the files (those of the hub) and the names of a model's parameters differ for many architectures.
transformers keeps both in a table (`transformers.conversion_mapping`). llmc asks this table for one tensor at a time, so that
a model can be read layer by layer.
"""

from __future__ import annotations

import re
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import nn

from llmc.errors import UserError
from llmc.formats.mixture import Experts, is_fused


class Target(NamedTuple):
    """What a stored tensor is for. parameter: of the model as transformers builds it.  converter: what transformers does with
    the tensor beside giving it a name; None for nothing.  pattern: which of the converter's sources it is."""

    parameter: str
    converter: Any = None
    pattern: str = ""

    @property
    def is_one_of_many(self) -> bool:
        """Whether transformers stacks this tensor with others of its kind: it is the matrix of one expert."""
        return any(type(op).__name__ == "MergeModulelist" for op in self.operations)

    @property
    def operations(self) -> list[Any]:
        return [] if self.converter is None else list(self.converter.operations)


class Conversion:
    """transformers' mapping for one model. With transformers 4.57, which has none, names are only compared."""

    def __init__(self, model: Any) -> None:
        self.known = own_names(model)
        self.prefix = getattr(model, "base_model_prefix", "") or ""
        self.model, self.renamings, self.converters = _AsBuilt(model), [], []  # type: ignore[var-annotated]
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter, rename_source_key
        except ImportError:
            self._rename: Any = None
            return
        self._rename = rename_source_key
        if hasattr(model, "is_custom_code"):
            transforms = get_model_conversion_mapping(model)
            self.converters = [t for t in transforms if isinstance(t, WeightConverter)]
            self.renamings = [t for t in transforms if not isinstance(t, WeightConverter)]

    def target(self, stored: str) -> Target | None:
        """What the tensor `stored` is for. None if the model has no place for it."""
        if self._rename is not None and self.renamings + self.converters:
            name, pattern = self._rename(stored, self.renamings, self.converters, self.prefix or None, self.known)
            if name in self.known:
                converter = next((c for c in self.converters if pattern in c.source_patterns), None) if pattern else None
                return Target(name, converter, pattern or "")
        found = next((n for n in spellings(stored, self.prefix) if n in self.known), None)
        return None if found is None else Target(found)

    def convert(self, target: Target, tensors: dict[str, list[torch.Tensor]]) -> torch.Tensor:
        """The parameter, made of {source pattern: tensors} as transformers makes it."""
        converter = deepcopy(target.converter)
        for pattern, found in tensors.items():
            for tensor in found:
                converter.add_tensor(target.parameter, target.parameter, pattern, lambda t=tensor: t)
        made = converter.convert(target.parameter, model=self.model, config=self.model.config)
        value = made.get(target.parameter)
        if value is None:
            raise UserError(f"transformers {_version()} makes {', '.join(made)} of the tensors for {target.parameter}",
                            "llmc cannot read this architecture yet: please report it")
        tensor = value[0] if isinstance(value, list) else value
        assert isinstance(tensor, torch.Tensor)
        return tensor


class _AsBuilt:
    """A model for transformers' operations, which ask for shapes of parameters: also of those that `unfuse` replaces."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._shapes = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}

    def get_parameter(self, name: str) -> torch.Tensor:
        return torch.empty(self._shapes[name], device="meta")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def own_names(model: nn.Module) -> dict[str, bool]:
    """The names of a model's parameters and buffers, as transformers builds it: experts are stacked."""
    names = dict.fromkeys((n for n, _ in model.named_parameters(remove_duplicate=False)), True)
    names |= dict.fromkeys((n for n, _ in model.named_buffers()), True)
    for path, module in model.named_modules():
        if isinstance(module, Experts):
            names |= {f"{path}.{name}": True for name in module.leaves}
    return names


def stacked_names(model: nn.Module) -> set[str]:
    """The names of the parameters that hold one matrix for each expert."""
    found = set()
    for path, module in model.named_modules():
        if isinstance(module, Experts):
            found |= {f"{path}.{name}" for name in module.leaves}
        elif is_fused(module):
            found |= {f"{path}.{name}" for name, p in module.named_parameters(recurse=False) if p.ndim == 3}
    return found


def spellings(name: str, prefix: str) -> tuple[str, str, str]:
    """The name unchanged, without the prefix of the base model, and with it."""
    dotted = f"{prefix}." if prefix else ""
    return name, name.removeprefix(dotted), dotted + name


def expert_of(stored: str) -> tuple[int, str]:
    """(number, what follows it) of the expert in a tensor's name: (3, 'gate_proj') for 'mlp.experts.3.gate_proj.weight'."""
    found = re.search(r"^.*\.(\d+)\.(.+?)(?:\.weight)?$", stored)
    assert found is not None, stored
    return int(found.group(1)), found.group(2)


def _version() -> str:
    import transformers

    return str(transformers.__version__)
