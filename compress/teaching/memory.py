"""The memory of a training: `llmc heal` and `llmc distill`, as sums of what the code allocates (llmc/memory.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from llmc.compress.ends import is_tied
from llmc.compress.memory import FLOAT, Sizes
from llmc.compress.skeleton import Skeleton, linears_of
from llmc.compress.teaching.loss import CACHE_BYTES, CHUNK_BYTES
from llmc.compress.teaching.texts import TextSettings
from llmc.compress.text import SELF
from llmc.formats.linears import get_weight
from llmc.memory import PROCESS, TORCH, Step

ADAM = 2 * FLOAT  # bytes of the two moments of a parameter


class Settings(TextSettings, Protocol):
    """The options that decide the memory of a training."""

    @property
    def checkpointing(self) -> bool: ...
    @property
    def teacher_top_k(self) -> int | None: ...


@dataclass(frozen=True)
class Model:
    """A model in training. linears: number of weights of the linears in its layers.  tied: the head is the embedding."""

    sizes: Sizes
    linears: int
    tied: bool

    def teacher(self, dtype: torch.dtype) -> int:
        """`load_teacher`: linears and head in `dtype`, all else in float32. A tied head that is cast is a copy."""
        head = self.sizes.head
        cast = self.linears + (0 if self.tied else head)
        copy = dtype.itemsize * head if self.tied and dtype != torch.float32 else 0
        return dtype.itemsize * cast + FLOAT * (self.sizes.weights - cast) + copy


def activations(s: Sizes, c: Settings, dtype: torch.dtype) -> int:
    """Bytes that the backward pass needs. A layer keeps the input and the output of each linear, the product of gate and up,
    queries, keys and values once more (turned), and eight states of the residual stream, float32 (the input of each norm, its
    square, the normed one and the sum). With checkpointing there is one such layer, and one state for every layer."""
    linears = sum(g.width * len(g.outs) + 2 * sum(g.outs) for g in s.groups)
    layer = dtype.itemsize * linears + 8 * FLOAT * s.hidden
    tokens = c.batch * c.seq_len
    return tokens * (layer + FLOAT * s.hidden * s.layers if c.checkpointing else layer * s.layers)


def losses(vocab: int, tokens: int) -> int:
    """`distillation_loss`: logits of student and teacher and the gradient, CHUNK_BYTES each, and what `compare` makes of a
    few rows: two log-softmaxes, an exponential and their product."""
    chunk = min(CHUNK_BYTES, FLOAT * vocab * tokens)
    return 3 * chunk + 4 * min(CACHE_BYTES, chunk)


def distilling(student: Model, teacher: Model, c: Settings, dtype: torch.dtype, trained: int, adapters: int) -> Step:
    """A step of `Distilling`. trained: number of trained weights.  adapters: number of those that are adapters (0: all
    weights are trained)."""
    s, tokens = student.sizes, c.batch * c.seq_len
    terms = {
        PROCESS: TORCH, "weights of the student": FLOAT * (s.weights + adapters),
        "gradients and optimizer": (FLOAT + ADAM) * trained, **_teacher(teacher, c, dtype),
        "activations": activations(s, c, dtype), "losses": losses(s.vocabulary, tokens)}
    if not adapters:
        # `_Closed` keeps the head's gradient until the backward pass has used it; a tied embedding makes another of its own
        terms["gradients of the head"] = FLOAT * s.head * (1 + student.tied)
    if dtype != torch.float32:  # autocast keeps a copy of each weight until the step ends
        terms["weights in bf16"] = dtype.itemsize * (student.linears + s.head)
    return Step("training", terms)


def healing(student: Model, teacher: Model, c: Settings, dtype: torch.dtype, factors: int, codes: int) -> Step:
    """A step of `EndToEnd`. factors: number of trained scales and minimums.  codes: bytes of levels and factors."""
    s, tokens = student.sizes, c.batch * c.seq_len
    largest = max(g.largest for g in s.groups) // FLOAT
    return Step("training", {
        PROCESS: TORCH, "embedding and head": FLOAT * (s.weights - student.linears),
        "codes and factors": codes,
        "weights in the type of products": dtype.itemsize * student.linears,  # `_multiply_out`
        "gradients and optimizer": (FLOAT + ADAM) * factors, **_teacher(teacher, c, dtype),
        "activations": activations(s, c, dtype), "gradient of a weight": 2 * dtype.itemsize * largest,  # `_Product.backward`
        "losses": losses(s.vocabulary, tokens)})


def healing_block(student: Model, c: Settings, dtype: torch.dtype, factors: int, codes: int, judged: int) -> Step:
    """A step of `Blocks`: the teacher's layer and the student's. factors, codes: of one layer, as for `healing`.  judged:
    tokens at once in checks."""
    s = student.sizes
    linears = sum(g.weights for g in s.groups) // FLOAT
    one = Sizes(**{**vars(s), "layers": 1})
    return Step("training a layer", {
        PROCESS: TORCH, "the teacher's layer and its copy": 2 * FLOAT * s.layer,
        "codes and factors": codes, "weights in the type of products": dtype.itemsize * linears,
        "gradients and optimizer": (FLOAT + ADAM) * factors,
        "activations": max(activations(one, c, dtype), judged * s.per_token)})


def opening(student: Model, teacher: Model, c: Settings, dtype: torch.dtype, mapped: int) -> Step:
    """`load_student`, and `load_torch_model` of a float student: the weights in float32. mapped: bytes of files that are
    mapped meanwhile."""
    s = student.sizes
    return Step("loading the student", {PROCESS: TORCH, "weights of the student": FLOAT * s.weights,
                                        **_teacher(teacher, c, dtype)}, mapped)


def _teacher(teacher: Model, c: Settings, dtype: torch.dtype) -> dict[str, int]:
    """The teacher, and its states of the held-out sequences (`Running.kept`); nothing with --teacher-top-k."""
    if c.teacher_top_k:
        return {}
    return {"weights of the teacher": teacher.teacher(dtype),
            "states of the teacher": FLOAT * teacher.sizes.hidden * c.seq_len * (c.held_out + c.batch)}


def model_of(skeleton: Skeleton) -> Model:
    """The sizes of a model in training."""
    linears = sum(get_weight(m).numel() for _, _, m in linears_of(skeleton))
    return Model(Sizes.of(skeleton), linears, is_tied(skeleton))


def sampled(c: Settings) -> int:
    """The number of sequences that `texts.gather` samples from the teacher, at most `sampling.BATCH` of them at once."""
    named = [spec for spec in c.calibration if spec != SELF]
    return c.sampled if named else c.held_out + c.steps * c.batch
