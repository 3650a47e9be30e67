"""The one mapping between the parameters of transformers' model and the tensors in the files.

The files may name a tensor as the model does, or leave out the prefix of its base model ("layers.0…" for
"model.layers.0…"), or add it. A quantized linear X has no tensor "X.weight": its codes stand for it.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llmc.errors import UserError
from llmc.formats.checkpoint import Checkpoint


class Stored(NamedTuple):
    """Where a parameter lies. name: of its tensor; where it is codes, of the linear that they belong to."""

    name: str
    is_codes: bool


class Names:
    """Both directions, for one checkpoint and one model.

    folder: of the checkpoint, for messages.  tensors: the names in its files.  prefix: of the base model in the model, ""
    for none.  own: names of the model's modules and parameters.  linears: of the quantized linears, as the files name them.
    tied: {parameter: the one whose tensor it has, where the files hold none of its own}.
    """

    def __init__(self, folder: Path, tensors: Iterable[str], prefix: str, own: Iterable[str] = (),
                 linears: Iterable[str] = (), tied: Mapping[str, str] | None = None) -> None:
        self.folder, self.prefix = folder, f"{prefix}." if prefix else ""
        self.tensors, self.known, self.linears, self.tied = set(tensors), set(own), set(linears), tied or {}

    @classmethod
    def of(cls, checkpoint: Checkpoint, model: Any, linears: Iterable[str] = (),
           tied: Mapping[str, str] | None = None) -> Names:
        """model: transformers' model of the checkpoint, with or without weights."""
        own = (name for part in (model.named_modules(), model.named_parameters(remove_duplicate=False)) for name, _ in part)
        return cls(checkpoint.folder, checkpoint.names(), getattr(model, "base_model_prefix", ""), own, linears, tied)

    def find(self, parameter: str) -> str | None:
        """The tensor that holds a parameter (or a buffer) as it is; None where there is none."""
        return self._among(self.tensors, parameter)

    def stored(self, parameter: str) -> str:
        """The same; UserError where there is none."""
        found = self.find(parameter)
        if found is None:
            raise missing(self.folder, parameter)
        return found

    def locate(self, parameter: str) -> Stored | None:
        """Where a parameter lies, be it as codes or as the tensor that it shares; None where the files have nothing of it."""
        for name in self._spellings(parameter):
            if name in self.tensors:
                return Stored(name, False)
            if (linear := name.removesuffix(".weight")) in self.linears:
                return Stored(linear, True)
        return self.locate(self.tied[parameter]) if parameter in self.tied else None

    def find_own(self, stored: str) -> str | None:
        """The model's name of a module or parameter that the files call `stored`; None where the model has no such."""
        return self._among(self.known, stored)

    def own(self, stored: str) -> str:
        """The same; UserError where the model has no such."""
        found = self.find_own(stored)
        if found is None:
            raise UserError(f"{stored} of {self.folder} has no place in the model that its config.json names",
                            "the checkpoint holds more than its architecture")
        return found

    def _among(self, known: Container[str], name: str) -> str | None:
        return next((n for n in self._spellings(name) if n in known), None)

    def _spellings(self, name: str) -> tuple[str, str, str]:
        """A name as it is, without the prefix, and with it."""
        return name, name.removeprefix(self.prefix), self.prefix + name


def missing(folder: Path, *parameters: str) -> UserError:
    """What is said where the files of a model lack tensors."""
    more = f" and {len(parameters) - 1} more" if len(parameters) > 1 else ""
    return UserError(f"{folder} has no tensor {parameters[0]}{more}", "it is incomplete: download or make it again")
