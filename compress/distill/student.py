"""The student as it learns: one module from token ids to the loss, so that it can be trained in several processes.

Hidden states are compared layer by layer: the student's, through a learned matrix, against those of the teacher's layer that
it is mapped to (Romero et al., "FitNets", 2015, arXiv:1412.6550; for transformers Jiao et al., "TinyBERT", 2020,
arXiv:1909.10351, section 3). The error of a token counts relative to the energy of its state, since a few tokens have
enormous ones. The matrices are not part of the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from llmc.compress.skeleton import find_layers
from llmc.compress.teaching.loss import Aims, Objective, distil
from llmc.compress.teaching.models import head_of, hidden_states
from llmc.errors import UserError


class Student(nn.Module):
    """model: the student.  layers: of it, whose states are compared, with `weight`; widths: of its states and the teacher's.
    vocab: how many logits of the head count."""

    def __init__(self, model: Any, objective: Objective, vocab: int, layers: Sequence[int] = (), weight: float = 0.0,
                 widths: tuple[int, int] = (0, 0), seed: int = 0) -> None:
        super().__init__()
        self.model, self.objective, self.vocab, self.layers, self.weight = model, objective, vocab, layers, weight
        self.projections = nn.ModuleList(projection(*widths, seed + i) for i in range(len(layers)))

    def forward(self, ids: torch.Tensor, targets: torch.Tensor, aims: Aims, theirs: Sequence[torch.Tensor] = ()) -> Any:
        """(what is to be minimised, the objective on the logits, mean nll, error of the hidden states), all scalars.

        ids: int64 [n, seq_len].  targets: int64 [n * seq_len], -1 where nothing counts.  theirs: the states that leave the
        teacher's mapped layers, [n, seq_len, width].
        """
        layers = self.layers if theirs else ()
        with captured(self.model, layers) as ours:
            states = hidden_states(self.model, ids).float()
        with head_of(self.model) as head:
            loss, nll = distil(states, aims, head, self.vocab, self.objective, targets, self.head_parameters())
        hidden = torch.zeros((), device=states.device)
        for project, mine, aim in zip(self.projections if theirs else (), ours, theirs, strict=True):
            hidden = hidden + relative_error(project(mine), aim) / len(theirs)
        return loss + self.weight * hidden, loss.detach(), nll, hidden.detach()

    def head_parameters(self) -> list[nn.Parameter]:
        """Those between hidden states and logits that are trained (a tied table is the body's too)."""
        body = getattr(self.model, self.model.base_model_prefix)
        inside = {id(p) for p in body.parameters()}
        own = [p for p in self.model.parameters() if id(p) not in inside]
        found = {id(p): p for p in (*self.model.get_output_embeddings().parameters(), *own) if p.requires_grad}
        return list(found.values())


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of the squared error, relative to the energy of the teacher's state. Both: [..., width]."""
    theirs = theirs.float()
    return ((ours.float() - theirs).square().mean(-1) / theirs.square().mean(-1).clamp_min(1e-12)).mean()


def projection(ours: int, theirs: int, seed: int) -> nn.Linear:
    """From states of one width to another: it starts as the identity where they are equal, else as a random isometry."""
    linear = nn.Linear(ours, theirs, bias=False)
    with torch.no_grad():
        if ours == theirs:
            linear.weight.copy_(torch.eye(ours))
        else:
            made = torch.randn(max(ours, theirs), min(ours, theirs), generator=torch.Generator().manual_seed(seed))
            q = torch.linalg.qr(made).Q
            linear.weight.copy_(q if theirs > ours else q.t())
    return linear


@contextmanager
def captured(model: Any, layers: Sequence[int]) -> Iterator[list[torch.Tensor]]:
    """Inside, the states that leave these decoder layers are gathered, in the order of `layers`, as the model runs."""
    found: dict[int, torch.Tensor] = {}
    states: list[torch.Tensor] = []

    def keep(index: int) -> Any:
        def hook(_module: nn.Module, _args: Any, out: Any) -> None:
            found[index] = out[0] if isinstance(out, tuple) else out
            if len(found) == len(set(layers)):
                states[:] = [found[i] for i in layers]
        return hook

    handles = [find_layers(model)[1][i].register_forward_hook(keep(i)) for i in sorted(set(layers))]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def map_layers(given: list[tuple[int, int]] | None, ours: int, theirs: int) -> list[tuple[int, int]]:
    """(student's layer, teacher's layer), counted from 0: as given, or every layer of the student's, evenly spread over the
    teacher's so that the last meets the last.  ours, theirs: how many layers there are."""
    if given is None:
        return [(i, max(0, round((i + 1) * theirs / ours) - 1)) for i in range(ours)]
    if wrong := [f"{a}:{b}" for a, b in given if not (0 <= a < ours and 0 <= b < theirs)]:
        raise UserError(f"--layer-map {','.join(wrong)}: the student's layers are 0 to {ours - 1}, the teacher's 0 to "
                        f"{theirs - 1}", "name layers that are there, or leave --layer-map out")
    if len({a for a, _ in given}) < len(given):
        raise UserError("--layer-map names a layer of the student twice",
                        "give each layer of the student one of the teacher's")
    return given
