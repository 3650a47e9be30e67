"""The student in training: one module from token ids to the loss, so that several processes can train it.

Hidden states are compared layer by layer. A learned matrix maps the states of a student's layer to those of a teacher's layer
(Romero et al., "FitNets", 2015, arXiv:1412.6550; for transformers Jiao et al., "TinyBERT", 2020, arXiv:1909.10351, section
3). The error of a token is divided by the energy of its teacher state, because a few tokens have very large states. The
learned matrices are not part of the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from llmc.compress.teaching.loss import Objective, SoftTargetsOf, distillation_loss
from llmc.compress.teaching.models import head_of, hidden_states
from llmc.compress.tracing import states_of
from llmc.errors import UserError
from llmc.formats.linears import find_layers


class Student(nn.Module):
    """model: the student.  layers: the student's layers whose states are compared.  weight: of that error in the loss.
    widths: of the student's states and of the teacher's.  vocab: number of logits that are compared (the first ones)."""

    def __init__(self, model: Any, objective: Objective, vocab: int, layers: Sequence[int] = (), weight: float = 0.0,
                 widths: tuple[int, int] = (0, 0), seed: int = 0) -> None:
        super().__init__()
        self.model, self.objective, self.vocab, self.layers, self.weight = model, objective, vocab, layers, weight
        self.projections = nn.ModuleList(projection(*widths, seed + i) for i in range(len(layers)))

    def forward(self, ids: torch.Tensor, targets: torch.Tensor, soft_targets: SoftTargetsOf,
                teacher_states: Sequence[torch.Tensor] = ()) -> Any:
        """Returns (the total loss, the objective on the logits, mean negative log-likelihood, error of the hidden states),
        all scalars.

        ids: int64 [n, seq_len].  targets: int64 [n * seq_len], the next tokens, -1 at positions that do not count.
        teacher_states: the outputs of the teacher's mapped layers, each [n, seq_len, width].
        """
        layers = self.layers if teacher_states else ()
        with captured(self.model, layers) as student_states:
            states = hidden_states(self.model, ids).float()
        with head_of(self.model) as head:
            loss, nll = distillation_loss(states, soft_targets, head, self.vocab, self.objective, targets,
                                          self.head_parameters())
        hidden = torch.zeros((), device=states.device)
        projections = self.projections if teacher_states else ()
        for project, student, teacher in zip(projections, student_states, teacher_states, strict=True):
            hidden = hidden + relative_error(project(student), teacher) / len(teacher_states)
        return loss + self.weight * hidden, loss.detach(), nll, hidden.detach()

    def head_parameters(self) -> list[nn.Parameter]:
        """The trained parameters between hidden states and logits (a tied matrix belongs to the body too)."""
        body = getattr(self.model, self.model.base_model_prefix)
        inside = {id(p) for p in body.parameters()}
        own = [p for p in self.model.parameters() if id(p) not in inside]
        found = {id(p): p for p in (*self.model.get_output_embeddings().parameters(), *own) if p.requires_grad}
        return list(found.values())


def relative_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of the squared error, relative to the energy of the teacher's state. Both: [..., width]."""
    teacher = teacher.float()
    return ((student.float() - teacher).square().mean(-1) / teacher.square().mean(-1).clamp_min(1e-12)).mean()


def projection(student: int, teacher: int, seed: int) -> nn.Linear:
    """A linear from states of width `student` to states of width `teacher`. It starts as the identity if the widths are
    equal, else as a random isometry."""
    linear = nn.Linear(student, teacher, bias=False)
    with torch.no_grad():
        if student == teacher:
            linear.weight.copy_(torch.eye(student))
        else:
            made = torch.randn(max(student, teacher), min(student, teacher), generator=torch.Generator().manual_seed(seed))
            q = torch.linalg.qr(made).Q
            linear.weight.copy_(q if teacher > student else q.t())
    return linear


@contextmanager
def captured(model: Any, layers: Sequence[int]) -> Iterator[list[torch.Tensor]]:
    """Inside, each run of the model fills the returned list with the outputs of these decoder layers, in the order of
    `layers`."""
    found: dict[int, torch.Tensor] = {}
    states: list[torch.Tensor] = []

    def keep(index: int) -> Any:
        def hook(_module: nn.Module, _args: Any, out: Any) -> None:
            found[index] = states_of(out)
            if len(found) == len(set(layers)):
                states[:] = [found[i] for i in layers]
        return hook

    handles = [find_layers(model)[1][i].register_forward_hook(keep(i)) for i in sorted(set(layers))]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def map_layers(given: list[tuple[int, int]] | None, student: int, teacher: int) -> list[tuple[int, int]]:
    """Pairs (student's layer, teacher's layer), counted from 0: the given pairs, or every layer of the student, evenly spread
    over the teacher's layers, the last one to the last one.  student, teacher: number of layers."""
    if given is None:
        return [(i, max(0, round((i + 1) * teacher / student) - 1)) for i in range(student)]
    if wrong := [f"{a}:{b}" for a, b in given if not (0 <= a < student and 0 <= b < teacher)]:
        raise UserError(f"--layer-map {','.join(wrong)}: the student's layers are 0 to {student - 1}, the teacher's 0 to "
                        f"{teacher - 1}", "name layers that exist, or leave out --layer-map")
    if len({a for a, _ in given}) < len(given):
        raise UserError("--layer-map names a layer of the student twice",
                        "give each layer of the student one layer of the teacher")
    return given
