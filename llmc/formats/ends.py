"""The rule for embedding and head: one matrix, or two. Every command asks here before it works.

`tie_word_embeddings` of config.json, a stored head and its values must agree. A stored head with the embedding's values may
be left out of a file, whatever its type.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from llmc.errors import UserError
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.names import Names, Stored

ROWS = 4096  # compared at once


class Ends:
    """Whether head and embedding of a model are one matrix.

    says_tied: what the config says.  head: the stored name of the head, None if it has none.  same: compares the values.
    Raises UserError if they contradict each other.
    """

    def __init__(self, folder: Path, says_tied: bool, head: str | None, same: Callable[[], bool]) -> None:
        self.says_tied, self.head, self._same = says_tied, head, same
        if head is None and not says_tied:
            raise UserError(f"config.json of {folder} says that the head is a separate matrix, but there is none",
                            "download the model again, or correct tie_word_embeddings")
        if head is not None and says_tied and not self.one:
            raise UserError(f"config.json of {folder} says that head and embedding are one matrix, but its {head} differs",
                            "set tie_word_embeddings to false in config.json if the head is right")

    @cached_property
    def one(self) -> bool:
        """Whether one matrix can stand for both: there is no head, or it has the embedding's values."""
        return self.head is None or self._same()


def ends_of(ckpt: Checkpoint, model: Any, names: Names) -> tuple[Ends, Stored]:
    """The ends of a transformers model (which may have no weights), and where its embedding is."""
    modules = {id(m): n for n, m in model.named_modules()}
    head, embedding = model.get_output_embeddings(), names.locate(f"{modules[id(model.get_input_embeddings())]}.weight")
    if embedding is None or embedding.is_codes:
        raise UserError(f"{ckpt.folder} has no token embedding", "download the model again")
    says_tied = bool(getattr(model.config, "tie_word_embeddings", False))
    found = names.locate(f"{modules[id(head)]}.weight") if id(head) in modules else embedding
    if found is None and not says_tied and (other := renamed_head(ckpt, names, tuple(head.weight.shape))):
        found = Stored(other, False)
    stored = None if found is None or found == embedding else found

    def same() -> bool:
        return stored is not None and not stored.is_codes and same_values(ckpt, embedding.name, stored.name)

    return Ends(ckpt.folder, says_tied or found == embedding, stored and stored.name, same), embedding


def check_tied(ckpt: Checkpoint, model: Any, names: Names) -> None:
    """Raise UserError if a loaded model has one matrix for both and its files have two. Nothing is compared if transformers
    renames the embedding as it loads (multimodal models)."""
    modules = {id(m): n for n, m in model.named_modules()}
    embedding = modules[id(model.get_input_embeddings())]
    if getattr(model.config, "tie_word_embeddings", False) and names.locate(f"{embedding}.weight") is not None:
        ends_of(ckpt, model, names)


def renamed_head(ckpt: Checkpoint, names: Names, shape: tuple[int, ...]) -> str | None:
    """The stored name of a head that transformers renames as it loads (GPT-NeoX's embed_out is its lm_head): the one matrix
    of its shape that is no part of the model by its name. None if there is not exactly one."""
    alike = [n for n in ckpt.names() if ckpt.shape(n) == shape and names.find_own(n) is None]
    return alike[0] if len(alike) == 1 else None


def same_values(ckpt: Checkpoint, one: str, other: str) -> bool:
    """Whether two stored matrices have the same values, whatever their types."""
    return ckpt.shape(one) == ckpt.shape(other) and equal(ckpt.tensor(one), ckpt.tensor(other))


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two float matrices of one shape have the same values, whatever their types. Reads some rows at a time."""
    return a.shape == b.shape and all(torch.equal(x.double(), y.double())
                                      for x, y in zip(a.split(ROWS), b.split(ROWS), strict=True))
