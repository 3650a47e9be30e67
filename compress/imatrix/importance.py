"""An importance matrix read for a model: llama.cpp's names of its linears, and the importance of each input column."""

from __future__ import annotations

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


def matrix_names(skeleton: Skeleton) -> dict[str, str]:
    """llama.cpp's name of the weight of every decoder linear, by the linear's name in the model."""
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
        found = tensor_names.find(stored)
        if found is None:
            raise UserError(f"llama.cpp's {family.gguf.name} architecture has no tensor for {stored}",
                            "the checkpoint has tensors that the architecture in its config.json does not have")
        names[linear] = found
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
        input was zero."""
        entry = self.matrix.entries[self.names[linear]]
        mean = float(entry.sums.mean(dtype="float64"))
        return None if entry.unseen or mean == 0 else torch.from_numpy(entry.sums[0] / mean)


def _check(file: Path, matrix: Imatrix, names: dict[str, str], skeleton: Skeleton) -> None:
    """UserError if a linear has no entry, or one of another width."""
    hint = "the matrix was made from another model: make one for this model with `llmc imatrix`"
    if missing := sorted(set(names.values()) - set(matrix.entries)):
        raise UserError(f"{file} has no entry for {len(missing)} of {len(names)} linears (first {missing[0]})", hint)
    for linear, name in names.items():
        (experts, width), needed = matrix.entries[name].sums.shape, get_weight(skeleton.model.get_submodule(linear)).shape[1]
        if (experts, width) != (1, needed):
            found = f"{experts} experts of width {width}" if experts > 1 else f"width {width}"
            raise UserError(f"{name} in {file} has {found}, and {linear} has {needed} input columns", hint)
