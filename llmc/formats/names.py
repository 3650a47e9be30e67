"""The mapping between the parameters of a transformers model and the tensors in the files of its checkpoint.

A tensor may have the parameter's name, or this name without or with the prefix of the base model ("layers.0…" for
"model.layers.0…"). A quantized linear X has codes instead of a tensor "X.weight".
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llmc.errors import UserError
from llmc.formats.checkpoint import Checkpoint


class Stored(NamedTuple):
    """The place of a parameter. name: of its tensor, or of its linear if it is stored as codes."""

    name: str
    is_codes: bool


class Names:
    """The names of one checkpoint and one model, mapped in both directions.

    folder: of the checkpoint, for messages.  tensors: the names in its files.  prefix: of the base model, "" for none.
    own: names of the model's modules and parameters.  linears: names of the quantized linears in the files.
    tied: {parameter without a tensor: parameter whose tensor it shares}.
    """

    def __init__(self, folder: Path, tensors: Iterable[str], prefix: str, own: Iterable[str] = (),
                 linears: Iterable[str] = (), tied: Mapping[str, str] | None = None) -> None:
        self.folder, self.prefix = folder, f"{prefix}." if prefix else ""
        self.tensors, self.known, self.linears, self.tied = set(tensors), set(own), set(linears), tied or {}

    @classmethod
    def of(cls, checkpoint: Checkpoint, model: Any, linears: Iterable[str] = (),
           tied: Mapping[str, str] | None = None) -> Names:
        """The names of a checkpoint and its transformers model, which may have no weights."""
        own = (name for part in (model.named_modules(), model.named_parameters(remove_duplicate=False)) for name, _ in part)
        return cls(checkpoint.folder, checkpoint.names(), getattr(model, "base_model_prefix", ""), own, linears, tied)

    def find(self, parameter: str) -> str | None:
        """The name of the tensor of a parameter or buffer. None if it has none, or if it is stored as codes."""
        return self._among(self.tensors, parameter)

    def stored(self, parameter: str) -> str:
        """Like find, but raises UserError if there is none."""
        found = self.find(parameter)
        if found is None:
            raise missing(self.folder, parameter)
        return found

    def locate(self, parameter: str) -> Stored | None:
        """The place of a parameter: its tensor, its codes or the tensor that it shares. None if the files lack it."""
        for name in self._spellings(parameter):
            if name in self.tensors:
                return Stored(name, False)
            if (linear := name.removesuffix(".weight")) in self.linears:
                return Stored(linear, True)
        return self.locate(self.tied[parameter]) if parameter in self.tied else None

    def find_own(self, stored: str) -> str | None:
        """The model's name for the module or parameter that the files name `stored`. None if the model lacks it."""
        return self._among(self.known, stored)

    def own(self, stored: str) -> str:
        """Like find_own, but raises UserError if the model lacks it."""
        found = self.find_own(stored)
        if found is None:
            raise UserError(f"{stored} of {self.folder} is not part of the model that its config.json describes",
                            "the checkpoint has tensors that its architecture lacks")
        return found

    def _among(self, known: Container[str], name: str) -> str | None:
        return next((n for n in self._spellings(name) if n in known), None)

    def _spellings(self, name: str) -> tuple[str, str, str]:
        """The name unchanged, without the prefix, and with it."""
        return name, name.removeprefix(self.prefix), self.prefix + name


def missing(folder: Path, *parameters: str) -> UserError:
    """The error for a model whose files lack tensors."""
    more = f" and {len(parameters) - 1} more" if len(parameters) > 1 else ""
    return UserError(f"{folder} has no tensor {parameters[0]}{more}", "it is incomplete: download or make it again")
