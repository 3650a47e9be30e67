"""An importance matrix read for a model: llama.cpp's names of its linears, and the importance of each input column."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmc.compress.skeleton import Skeleton
from llmc.errors import UserError
from llmc.export.gguf.architectures import TensorNames, find_architecture
from llmc.files import sha256
from llmc.formats.imatrix import Imatrix, read_imatrix
from llmc.formats.linears import get_weight
from llmc.formats.manifest import read_manifest


@dataclass(frozen=True)
class Matrix:
    """llama.cpp's tensor for the weight of a linear. expert: its number in the tensor, 0 for a tensor that holds one matrix.
    experts: how many matrices the tensor holds."""

    name: str
    expert: int = 0
    experts: int = 1


def matrix_names(skeleton: Skeleton) -> dict[str, Matrix]:
    """llama.cpp's tensor of every decoder linear, by the linear's name in the model. A layer's experts are one tensor."""
    layers = range(len(skeleton.layers))
    family = find_architecture(skeleton.checkpoint.config, "llama-imatrix makes the matrix of any GGUF file; `llmc quantize "
                             "--method gptq` gathers its own statistics")
    try:
        tensor_names = TensorNames(family, len(layers))
    except ModuleNotFoundError as e:
        raise UserError("importance matrices need the package `gguf`", "pip install 'llmc-toolkit[gguf]'") from e
    names = {}
    for linear in (f"{skeleton.layer_name(i)}.{name}" for i in layers for name in skeleton.linears(i)):
        stored = skeleton.names.find(f"{linear}.weight") or f"{linear}.weight"
        expert = skeleton.expert_of(linear)
        found, number = tensor_names.place(stored)
        if found is None or (number is None) != (expert is None):
            raise UserError(f"llama.cpp's {family.gguf.name} architecture has no tensor for {stored}",
                            "the checkpoint has tensors that the architecture in its config.json does not have")
        names[linear] = Matrix(found) if expert is None else Matrix(found, *expert)
    return names


class Importance:
    """The mean square of every input column of every linear of a model.

    origin: describes the file, for manifests.  calibration: describes the text, from the file's manifest; None if llmc did
    not make the file.
    """

    def __init__(self, file: Path, skeleton: Skeleton) -> None:
        self.matrix, self.names = read_imatrix(file), matrix_names(skeleton)
        _check(file, self.matrix, self.names, skeleton)
        self.origin = {"name": file.name, "sha256": sha256(file), "datasets": self.matrix.datasets,
                       "chunk_count": self.matrix.chunk_count, "chunk_size": self.matrix.chunk_size}
        made: dict[str, Any] = read_manifest(file) or {}
        own = self.origin["sha256"] in made.get("outputs", {}).values()
        self.calibration = made["passes"][-1]["calibration"] if own else None

    def of(self, linear: str) -> torch.Tensor | None:
        """float32 [in], scaled to a mean of 1, for the linear of this name in the model; None if no token was seen or every
        input was zero. Of experts each has its own."""
        found = self.names[linear]
        entry = self.matrix.entries[found.name]
        sums, count = entry.sums[found.expert], entry.counts[found.expert]
        mean = float(sums.mean(dtype="float64"))
        return None if not count or mean == 0 else torch.from_numpy(sums / mean)


def _check(file: Path, matrix: Imatrix, names: dict[str, Matrix], skeleton: Skeleton) -> None:
    """UserError if a linear has no entry, or one of another width."""
    hint = "the matrix was made from another model: make one for this model with `llmc imatrix`"
    wanted = {found.name for found in names.values()}
    if missing := sorted(wanted - set(matrix.entries)):
        raise UserError(f"{file} has no entry for {len(missing)} of {len(wanted)} linears (first {missing[0]})", hint)
    for linear, of in names.items():
        experts, width = matrix.entries[of.name].sums.shape
        needed = get_weight(skeleton.model.get_submodule(linear)).shape[1]
        if (experts, width) != (of.experts, needed):
            found = f"{experts} experts of width {width}" if experts > 1 else f"width {width}"
            asked = f"{needed} input columns" + (f" and is one of {of.experts} experts" if of.experts > 1 else "")
            raise UserError(f"{of.name} in {file} has {found}, and {linear} has {asked}", hint)
