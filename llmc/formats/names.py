"""The mapping between the parameters of a transformers model and the tensors in the files of its checkpoint.

transformers itself says which parameter a tensor is for (conversion.py). Without its table, a tensor has the parameter's
name, or this name without or with the prefix of the base model ("layers.0…" for "model.layers.0…"). A quantized linear X
has codes instead of a tensor "X.weight". The matrix of one expert can be a tensor of its own, or a slice of a stacked one:
then its codes are called "STACKED.NUMBER".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llmc.errors import UserError
from llmc.formats.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch

    from llmc.formats.conversion import Conversion, Target


class Stored(NamedTuple):
    """The place of a parameter. name: of its tensor, or of its linear if it is stored as codes.  expert: its number, if the
    tensor holds a matrix for each expert."""

    name: str
    is_codes: bool
    expert: int | None = None


class Names:
    """The names of one checkpoint and one model, mapped in both directions.

    folder: of the checkpoint, for messages.  tensors: the names in its files.  prefix: of the base model, "" for none.
    own: names of the model's modules and parameters.  linears: names of the quantized linears in the files.
    tied: {parameter without a tensor: parameter whose tensor it shares}.
    conversion: transformers' mapping; None compares names.
    """

    def __init__(self, folder: Path, tensors: Iterable[str], prefix: str, own: Iterable[str] = (),
                 linears: Iterable[str] = (), tied: Mapping[str, str] | None = None,
                 conversion: Conversion | None = None) -> None:
        self.folder, self.prefix = folder, f"{prefix}." if prefix else ""
        self.tensors, self.known, self.linears, self.tied = set(tensors), set(own), set(linears), tied or {}
        self.conversion, self.stacked = conversion, set[str]()
        self.checkpoint: Checkpoint | None = None
        self._own: dict[str, str] = {}  # tensor or quantized linear -> what the model calls it
        self._places: dict[str, Stored] = {}  # parameter -> its place
        self._merged: dict[str, list[tuple[str, Target]]] = {}  # parameter -> the tensors that transformers makes it of
        self._stacks: dict[str, str] = {}  # quantized linear -> the tensor of which it is one expert
        self._leaves: dict[str, dict[str, None]] = {}  # stacked parameter -> names of its linears in one expert

    @classmethod
    def of(cls, checkpoint: Checkpoint, model: Any, linears: Iterable[str] = (),
           tied: Mapping[str, str] | None = None) -> Names:
        """The names of a checkpoint and its transformers model, which may have no weights. If its experts are stacked, call
        `unfuse(model, names.leaves)` to have the names that this mapping gives them."""
        from llmc.formats.conversion import Conversion, stacked_names

        conversion = Conversion(model)
        own = (name for part in (model.named_modules(), model.named_parameters(remove_duplicate=False)) for name, _ in part)
        names = cls(checkpoint.folder, checkpoint.names(), conversion.prefix, [*own, *conversion.known], linears, tied,
                    conversion)
        names.checkpoint, names.stacked = checkpoint, stacked_names(model)
        names._fill()
        return names

    def _fill(self) -> None:
        """Ask for every tensor and every quantized linear what it is for."""
        codes = {f"{linear}.weight": linear for linear in self.linears}
        for stored in [*self.tensors, *codes]:
            linear = codes.get(stored)
            name = linear if linear is not None else stored
            found, number = self._target(stored), None
            if found is None and linear is not None and (split := re.fullmatch(r"(.*)\.(\d+)", linear)):
                number = int(split.group(2))
                for base in (split.group(1), f"{split.group(1)}.weight"):
                    if (found := self._target(base)) is not None:
                        self._stacks[linear] = base
                        break
            if found is None:
                continue
            if found.parameter in self.stacked:
                self._note_expert(name, linear is not None, found, number)
            elif found.converter is not None:
                self._own[name] = found.parameter
                self._merged.setdefault(found.parameter, []).append((stored, found))
            else:
                self._own[name] = found.parameter.removesuffix(".weight") if linear is not None else found.parameter
                # the tensor with the parameter's own name comes first
                if found.parameter not in self._places or stored == found.parameter:
                    self._places[found.parameter] = Stored(name, linear is not None)

    def _target(self, stored: str) -> Target | None:
        assert self.conversion is not None
        return self.conversion.target(stored)

    def _note_expert(self, name: str, is_codes: bool, found: Target, number: int | None) -> None:
        """Note a tensor, or codes, of one expert or of all of them."""
        from llmc.formats.conversion import expert_of

        path, _, stacked = found.parameter.rpartition(".")
        if number is not None or (not found.is_one_of_many and not is_codes):
            leaf = stacked
        else:
            number, leaf = expert_of(name)
            leaf = leaf.replace(".", "_")
        # the order of the sources is the order of the outputs
        self._leaves.setdefault(found.parameter, {})[leaf] = None
        if number is not None:
            self._own[name] = f"{path}.{number}.{leaf}" + ("" if is_codes else ".weight")
            self._places[f"{path}.{number}.{leaf}.weight"] = Stored(name, is_codes)
        else:
            self._own[name] = found.parameter
            self._places[found.parameter] = Stored(name, False)
        if found.converter is not None:
            self._merged.setdefault(found.parameter, []).append((name, found))

    def leaves(self, parameter: str) -> tuple[str, ...]:
        """The names of the linears that a stacked parameter becomes in each expert, in the order of their outputs."""
        found = list(self._leaves.get(parameter, {parameter.rpartition(".")[2]: None}))
        sources = [target.converter.source_patterns for _, target in self._merged.get(parameter, ()) if target.converter]
        if sources and len(found) > 1:
            patterns = [f".{pattern}." for pattern in sources[0]]
            found.sort(key=lambda leaf: next((i for i, p in enumerate(patterns) if f".{leaf}." in p), len(patterns)))
        return tuple(found)

    def find(self, parameter: str) -> str | None:
        """The name of the tensor of a parameter or buffer. None if it has none, or if it is stored as codes."""
        found = self._places.get(parameter)
        if found is not None:
            return None if found.is_codes else found.name
        return next((n for n in self._spellings(parameter) if n in self.tensors and self._free(n)), None)

    def stored(self, parameter: str) -> str:
        """Like find, but raises UserError if there is none. For one expert of a stacked tensor: the name of its matrix
        after quantization."""
        found = self.find(parameter) or self._of_stack(parameter)
        if found is None:
            raise missing(self.folder, parameter)
        return found

    def _of_stack(self, parameter: str) -> str | None:
        place = self.locate(parameter)
        if place is None or place.is_codes or place.expert is None:
            return None
        return f"{place.name.removesuffix('.weight')}.{place.expert}.weight"

    def locate(self, parameter: str) -> Stored | None:
        """The place of a parameter: its tensor, its codes or the tensor that it shares. None if the files lack it."""
        if (found := self._places.get(parameter)) is not None:
            return found
        if parameter in self._merged:
            return Stored(self._merged[parameter][0][0], False)
        if (split := re.fullmatch(r"(.*)\.(\d+)\.(\w+)\.weight", parameter)) and (
                whole := self._places.get(f"{split.group(1)}.{split.group(3)}")) is not None:
            return Stored(whole.name, False, int(split.group(2)))
        for name in self._spellings(parameter):
            if name in self.tensors and self._free(name):
                return Stored(name, False)
            if (linear := name.removesuffix(".weight")) in self.linears and self._free(linear):
                return Stored(linear, True)
        return self.locate(self.tied[parameter]) if parameter in self.tied else None

    def replaced(self, parameters: Iterable[str]) -> set[str]:
        """The tensors in the files that hold these float parameters and no others: they are left out if the parameters are
        stored in another way. UserError if only some experts of a stacked tensor are among them."""
        experts: dict[str, set[int]] = {}
        found = set()
        for parameter in parameters:
            place = self.locate(parameter)
            if place is None:
                raise missing(self.folder, parameter)
            found.add(place.name)
            if place.expert is not None:
                experts.setdefault(place.name, set()).add(place.expert)
        for stacked, numbers in experts.items():
            assert self.checkpoint is not None
            if len(numbers) < (count := self.checkpoint.shape(stacked)[0]):
                raise UserError(f"{stacked} of {self.folder} holds {count} experts in one tensor, and "
                                f"{count - len(numbers)} of them would stay as they are",
                                "give a --keep that fits all of its experts, or none")
        return found

    def stack_name(self, stored: str) -> str | None:
        """The name of the tensor of which a quantized linear was one expert. None if each expert has tensors of its own."""
        return self._stacks.get(stored)

    def stack_of(self, stored: str) -> tuple[str, int] | None:
        """(stacked parameter, number of the expert) of a quantized linear that is one of its experts; None for others."""
        split = re.fullmatch(r"(.*)\.(\d+)\.(\w+)", self._own.get(stored, ""))
        if split and (parameter := f"{split.group(1)}.{split.group(3)}") in self.stacked:
            return parameter, int(split.group(2))
        return None

    def find_own(self, stored: str) -> str | None:
        """The model's name for the module or parameter that the files name `stored`. None if the model lacks it."""
        if stored in self._own:
            return self._own[stored]
        if (weight := self._own.get(f"{stored}.weight")) is not None:
            return weight.removesuffix(".weight")
        return next((n for n in self._spellings(stored) if n in self.known), None)

    def own(self, stored: str) -> str:
        """Like find_own, but raises UserError if the model lacks it."""
        found = self.find_own(stored)
        if found is None:
            raise UserError(f"{stored} of {self.folder} is not part of the model that its config.json describes",
                            "the checkpoint has tensors that its architecture lacks")
        return found

    def read(self, parameter: str) -> torch.Tensor | None:
        """The values of a float parameter or buffer as they are stored. None if it has no tensor, or is stored as codes."""
        assert self.checkpoint is not None
        assert self.conversion is not None
        if parameter in self._merged and parameter not in self._places:
            parts = self._merged[parameter]
            if any(name in self.linears for name, _ in parts):
                return None
            by_pattern: dict[str, list[torch.Tensor]] = {}
            for name, target in sorted(parts, key=lambda part: _natural(part[0])):
                by_pattern.setdefault(target.pattern, []).append(self.checkpoint.tensor(name))
            return self.conversion.convert(parts[0][1], by_pattern)
        place = self.locate(parameter)
        if place is None or place.is_codes:
            return None
        if place.expert is None:
            return self.checkpoint.tensor(place.name)
        return self._slice(parameter, place)

    def _slice(self, parameter: str, place: Stored) -> torch.Tensor:
        """The matrix of one expert of a stacked tensor, in the orientation of the model's stacked parameter."""
        assert self.checkpoint is not None
        assert self.conversion is not None
        assert place.expert is not None
        value = self.checkpoint.part(place.name, place.expert)
        stacked = re.sub(r"\.\d+\.(\w+)\.weight$", r".\1", parameter)
        if merged := self._merged.get(stacked):
            value = self.conversion.convert(merged[0][1], {merged[0][1].pattern: [value[None]]})[0]
        return value

    def _free(self, name: str) -> bool:
        """Whether transformers' mapping says nothing of a tensor or quantized linear."""
        return name not in self._own

    def _spellings(self, name: str) -> tuple[str, str, str]:
        """The name unchanged, without the prefix, and with it."""
        return name, name.removeprefix(self.prefix), self.prefix + name


def missing(folder: Path, *parameters: str) -> UserError:
    """The error for a model whose files lack tensors."""
    more = f" and {len(parameters) - 1} more" if len(parameters) > 1 else ""
    return UserError(f"{folder} has no tensor {parameters[0]}{more}", "it is incomplete: download or make it again")


def _natural(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts numbers in names by their value."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
