"""Healing block by block: train one decoder layer at a time against the output of the teacher's layer.

It is for models that are too large for end-to-end training: the memory holds one layer and its activations for one batch, and
no head. The hidden states of the teacher and of the healed model are in files, as in the calibration loop. A layer thus
learns to compensate the errors of the layers before it (Li et al., "BRECQ", ICLR 2021, section 3.2, without its Fisher
weights). The error of a token is divided by the energy of its teacher state, because the next layer normalizes the stream and
a few tokens have very large states.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from llmc.compress.arguments import Call
from llmc.compress.calibration import Streams, Workspace, sequences_at_once, walk
from llmc.compress.heal.config import HealConfig
from llmc.compress.heal.student import HealedLinear, moved, norm_weights, stored_tensors
from llmc.compress.heal.train import MOST_LR, optimizer_of
from llmc.compress.skeleton import Skeleton
from llmc.compress.states import StateStore
from llmc.compress.teaching.texts import Texts
from llmc.compress.teaching.training import Curve, set_rate
from llmc.compress.tracing import states_of
from llmc.console import say
from llmc.errors import UserError
from llmc.formats import quantized
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.names import Names


class Blocks:
    """Heals the layers of one model. skeleton: the teacher.  forward: a context in which layers run in the right precision.
    dtype: of the matrix products."""

    def __init__(self, config: HealConfig, student: Checkpoint, skeleton: Skeleton, texts: Texts, work: Path,
                 forward: Callable[[], Any], dtype: torch.dtype) -> None:
        self.config, self.student, self.skeleton, self.texts = config, student, skeleton, texts
        self.forward, self.dtype = forward, dtype
        self.names = Names.of(student, skeleton.model, quantized.linears(student))
        self.linears = {self.names.own(n): n for n in quantized.linears(student)}  # module's name -> name in the checkpoint
        _check_embeddings(skeleton, student, self.names)
        n, width = texts.sequences.shape
        self.work = Workspace(work, {}, config.resume)
        self.streams = Streams(skeleton, texts.sequences, self.work, {"student": n, "teacher": n},
                               sequences_at_once(skeleton, width))
        self.student_states, self.teacher_states = self.streams.stores
        if self.work.done:
            say(f"resuming after layer {self.work.done} of {len(skeleton.layers)}")

    def run(self) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        """Heal every layer. Returns (the changed tensors by their names in the checkpoint, a record of each layer)."""
        layers, tensors = len(self.skeleton.layers), dict[str, torch.Tensor]()
        walk(self.skeleton, range(self.work.done, layers), "healing, layer", self._visit, self.work.done)
        for index in range(layers):
            tensors |= load_file(self.work.layer_file(index))
        return tensors, self.work.records()

    def _visit(self, index: int, layer: nn.Module) -> str:
        tensors, record = self._heal(index, layer)
        self.student_states.advance()  # _heal has advanced the teacher's states
        self.work.save_layer(index, tensors, record)
        self.streams.settle(index + 1, self.streams.side)
        return f"error {100 * record['before']:.2f} -> {100 * record['error']:.2f} %"

    def _heal(self, index: int, layer: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Heal one layer, and write the output states of the teacher's layer and of the healed one. Returns (the changed
        tensors, the layer's record)."""
        self._pass(layer, index, self.teacher_states)
        self.teacher_states.advance()
        student, linears = self._quantized(index, layer)
        factors = {f"{n}.{kind}": p for n, m in linears.items() for kind, p in m.trained().items()}
        norms = norm_weights(student) if self.config.norms else {}
        curve = self._train(student, index, factors, {n: p.requires_grad_(True) for n, p in norms.items()})
        self._pass(student, index, self.student_states)
        tensors = stored_tensors(self.student, linears)
        prefix = self.skeleton.layer_name(index)
        tensors |= {self.names.stored(f"{prefix}.{n}"): p.detach().cpu().float() for n, p in norms.items()}
        return tensors, {"layer": index, "error": curve.best["kld"], "before": curve.checks[0]["kld"],
                         "best_step": curve.best["step"], "steps": len(curve.losses), "scales_moved": moved(linears),
                         "trained": {"scales": sum(p.numel() for p in factors.values()),
                                     "norms": sum(p.numel() for p in norms.values())}, "events": []}

    def _quantized(self, index: int, layer: nn.Module) -> tuple[nn.Module, dict[str, HealedLinear]]:
        """Returns (the layer of the quantized model, its linears by their names in the checkpoint)."""
        student, linears = copy.deepcopy(layer), {}
        prefix = self.skeleton.layer_name(index)
        paths = [n for n, _ in student.named_modules() if f"{prefix}.{n}" in self.linears]
        for name, parameter in student.named_parameters():
            if name.removesuffix(".weight") not in paths:  # norms and biases of a transformed model differ from the teacher's
                parameter.data.copy_(self.student.tensor(self.names.stored(f"{prefix}.{name}")))
        for path in paths:
            name = self.linears[f"{prefix}.{path}"]
            bias = getattr(student.get_submodule(path), "bias", None)
            linears[name] = HealedLinear(quantized.read(self.student, name), bias, self.dtype).to(self.skeleton.device)
            student.set_submodule(path, linears[name])
        return student, linears

    @torch.no_grad()
    def _pass(self, layer: nn.Module, index: int, store: StateStore) -> None:
        """Run a layer over all sequences and store what it makes."""
        store.clear()
        for first, last in store.starts():
            out, call = self._run(layer, index, store, first, last)
            store.write(first, states_of(out))
            call.carry(out)

    def _run(self, layer: nn.Module, index: int, store: StateStore, first: int, last: int) -> tuple[Any, Call]:
        """Returns (what a layer returns for some sequences of a stream, its arguments)."""
        with self.forward():
            call = self.streams.arguments[index].call(first, last, store.carried)
            return layer(store.read(first, last).to(self.skeleton.device), **call.kwargs), call

    def _train(self, layer: nn.Module, index: int, factors: dict[str, Any], norms: dict[str, Any]) -> Curve:
        """Train one layer. It ends with the parameters that are best on the held-out sequences. In the curve 'kld' is the
        error of the layer's output."""
        c = self.config
        optimizer, parameters = optimizer_of(factors, norms), [*factors.values(), *norms.values()]
        curve = Curve([{"step": 0, "kld": self._judge(layer, index), "training": None}], [])
        best = [p.detach().clone() for p in parameters]
        for step in range(c.steps):
            if curve.stalled(c):
                break
            set_rate(optimizer, c.lr or MOST_LR, step, c.steps)
            optimizer.zero_grad(set_to_none=True)
            curve.losses.append(sum(self._learn(layer, index, step * c.accumulate + i) for i in range(c.accumulate)))
            optimizer.step()
            if (step + 1) % c.check_every == 0 or step + 1 == c.steps:
                error, least = self._judge(layer, index), curve.best["kld"]
                curve.checks.append({"step": step + 1, "kld": error, "training": curve.losses[-1]})
                if error < least:
                    best = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p, value in zip(parameters, best, strict=True):
                p.copy_(value)
        return curve

    def _learn(self, layer: nn.Module, index: int, batch: int) -> float:
        """Returns the loss of one batch and makes its gradients, both divided by the number of batches in a step."""
        held, size = self.texts.held_out, self.config.batch
        first = held + batch * size % max(1, self.texts.sequences.shape[0] - held - size + 1)
        loss = self._error(layer, index, first, first + size) / self.config.accumulate
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    @torch.no_grad()
    def _judge(self, layer: nn.Module, index: int) -> float:
        """The error over the held-out sequences."""
        held, size = self.texts.held_out, self.student_states.batch
        parts = [(a, min(a + size, held)) for a in range(0, held, size)]
        return sum(float(self._error(layer, index, a, b)) * (b - a) for a, b in parts) / held

    def _error(self, layer: nn.Module, index: int, first: int, last: int) -> torch.Tensor:
        """Mean over tokens of the squared error of the layer's output, relative to the teacher's energy."""
        target = self.teacher_states.read(first, last).to(self.skeleton.device)
        out = states_of(self._run(layer, index, self.student_states, first, last)[0]).float()
        return ((out - target).square().mean(-1) / target.square().mean(-1).clamp_min(1e-12)).mean()


def _check_embeddings(skeleton: Skeleton, student: Checkpoint, names: Names) -> None:
    """UserError if student and teacher have different embeddings: their states cannot be compared then. The states of a
    rotated model, for example, are the teacher's states in another basis."""
    for part, name in skeleton.outside():
        stored = skeleton.names.find(f"{name}.weight") if isinstance(part, nn.Embedding) else None
        if stored is None:
            continue
        embedding = skeleton.checkpoint.tensor(stored).float()
        if not torch.equal(embedding, student.tensor(names.stored(f"{name}.weight")).float()):
            raise UserError(f"{student.folder} has another {name} than the teacher: its states are not the teacher's",
                            "give the (transformed) float model that was quantized as --teacher, or use --scope end-to-end")
