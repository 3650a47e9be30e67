"""The memory that the passes over a model need, as sums of what the code allocates (llmc/memory.py). Pure arithmetic.

Sizes are those of float32 on the CPU. With bf16 products the activations take half. Comments name the function that makes a
term, and the copies that live at its fullest moment.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from llmc.compress.calibration import sequences_at_once, workers_for
from llmc.compress.ends import is_tied
from llmc.compress.sampling import BATCH, sampling_terms
from llmc.compress.skeleton import Skeleton
from llmc.formats.linears import get_weight
from llmc.formats.mixture import Experts
from llmc.memory import PROCESS, TORCH, Step
from llmc.rounding.scales import ROWS

FLOAT = 4  # bytes


@dataclass(frozen=True)
class Group:
    """Linears of a module that read inputs of one width. outs: their numbers of rows."""

    width: int
    outs: tuple[int, ...]

    @property
    def square(self) -> int:
        """Bytes of a matrix [in, in]."""
        return FLOAT * self.width**2

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return FLOAT * self.width * sum(self.outs)

    @property
    def largest(self) -> int:
        """Bytes of the largest linear."""
        return FLOAT * self.width * max(self.outs)


@dataclass(frozen=True)
class Sizes:
    """The shapes of a model that decide its memory.

    layer, weights: number of weights of the largest decoder layer, and of the whole model (a tied matrix counts once).
    resident: number of weights of the layer that are in memory at once: of its experts, those of the largest.
    groups: of the largest layer, with one of its experts.  hidden: width of the residual stream.  vocabulary: rows of the
    head.  layers: their number.
    embedding, head, tensor: number of weights of the embedding, of the head and of the largest tensor.
    stored, stored_layer: bytes of the whole model and of the embedding in its files.  element: bytes of its weights there.
    """

    layer: int
    resident: int
    weights: int
    groups: tuple[Group, ...]
    hidden: int
    vocabulary: int
    layers: int
    head: int
    tensor: int
    stored: int
    element: int

    @classmethod
    def of(cls, skeleton: Skeleton) -> Sizes:
        checkpoint, head = skeleton.checkpoint, skeleton.model.get_output_embeddings().weight
        layer = max(skeleton.layers, key=lambda m: (resident(m), sum(p.numel() for p in m.parameters())))
        index = next(i for i, m in enumerate(skeleton.layers) if m is layer)
        largest = max(checkpoint.names(), key=checkpoint.nbytes)
        numbers = 1
        for n in checkpoint.shape(largest):
            numbers *= n
        return cls(sum(p.numel() for p in layer.parameters()), resident(layer), weights_of(skeleton),
                   groups_of(skeleton, index), skeleton.config.get_text_config().hidden_size, head.shape[0],
                   len(skeleton.layers), head.numel(), numbers,
                   sum(map(checkpoint.nbytes, checkpoint.names())), checkpoint.nbytes(largest) // numbers)

    @property
    def widest(self) -> int:
        """The largest number of inputs or outputs of a linear."""
        return max(max(g.width, *g.outs) for g in self.groups)

    @property
    def per_token(self) -> int:
        """Bytes of one token's activations in a layer at their fullest moment.

        Four of the widest (gate, its activation, up and their product; or the inputs and outputs of the linears of attention
        with queries, keys and values turned and repeated) and four of the residual stream (input, norm, sum, output)."""
        return FLOAT * (4 * self.widest + 4 * self.hidden)


def resident(layer: nn.Module) -> int:
    """The number of a layer's weights that are in memory at once. Experts are read one at a time."""
    experts = [m for m in layer.modules() if isinstance(m, Experts)]
    single = [sum(p.numel() for p in linear.parameters()) for m in experts for n in range(m.count)
              for linear in m.linears(n).values()]
    one = max((sum(p.numel() for x in m.linears(0).values() for p in x.parameters()) for m in experts), default=0)
    return sum(p.numel() for p in layer.parameters()) - sum(single) + one


def weights_of(skeleton: Skeleton) -> int:
    """The number of weights. A tied matrix counts once (a skeleton holds it twice)."""
    twice = skeleton.model.get_output_embeddings().weight.numel() if is_tied(skeleton) else 0
    return sum(p.numel() for p in skeleton.model.parameters()) - twice


def groups_of(skeleton: Skeleton, index: int) -> tuple[Group, ...]:
    """The linears of a layer by the module that holds them and by width. Linears that share an input are in one group; a
    group may hold one more (an output projection that is as wide), so its bytes are an upper bound."""
    found: dict[tuple[str, int], list[int]] = {}
    for name, linear in skeleton.linears(index).items():
        if skeleton.is_another_expert(index, name):  # all are like the first
            continue
        out, width = get_weight(linear).shape
        found.setdefault((name.rpartition(".")[0], width), []).append(out)
    return tuple(Group(width, tuple(outs)) for (_, width), outs in found.items())


def reading(s: Sizes) -> Step:
    """`Checkpoint.tensor`: the largest tensor is read, and summed in float32 to find NaN (torch makes a copy for that)."""
    copy = 0 if s.element >= FLOAT else FLOAT * s.tensor
    return Step("reading the weights", {PROCESS: TORCH, "the largest tensor and a float32 copy": s.element * s.tensor + copy})


def sampling(skeleton: Skeleton, seq_len: int, sequences: int = BATCH) -> Step:
    """`sample_from_model`: the whole model in bfloat16 writes text."""
    s = Sizes.of(skeleton)
    terms = sampling_terms(skeleton.config, s.weights, seq_len, min(sequences, BATCH))
    return Step("sampling text from the model", {PROCESS: TORCH, **terms}, s.stored)


def entering(s: Sizes, seq_len: int) -> Step:
    """`entering.enter`: layer 0 runs; four texts of six sequences pass the layers, and two of them change in every layer. The
    embedding stays in its stored type."""
    return Step("embedding the text", {
        PROCESS: TORCH, "one layer in float32": FLOAT * s.resident, "activations": seq_len * s.per_token,
        "states": FLOAT * s.hidden * seq_len * (6 + 2 * s.layers), "embedding": s.element * s.head})


def whole_model(s: Sizes) -> dict[str, int]:
    """What `load_torch_model` made in float32."""
    return {"the whole model in float32": FLOAT * s.weights}


def loading(s: Sizes, whose: str = "the model") -> Step:
    """`load_torch_model` in float32: its files are mapped until it is loaded, and no longer."""
    return Step(f"loading {whose}", {PROCESS: TORCH, f"weights of {whose}": FLOAT * s.weights},
                s.stored if s.element < FLOAT else 0)


@dataclass(frozen=True)
class Running:
    """The loop over the layers. tokens: of the batches of all workers.  workers: their number.  seq_len: of one sequence.

    Several workers are threads of their own, and a thread keeps the small blocks (up to 32 MB in glibc) that it frees. So the
    activations of the workers count also while the main thread works."""

    sizes: Sizes
    tokens: int
    workers: int
    seq_len: int

    @classmethod
    def of(cls, skeleton: Skeleton, seq_len: int, sequences: int, workers: int | None = None) -> Running:
        workers = workers or workers_for(skeleton)
        at_once = min(sequences, workers * sequences_at_once(skeleton, seq_len, workers))
        return cls(Sizes.of(skeleton), at_once * seq_len, workers, seq_len)

    @property
    def held(self) -> dict[str, int]:
        """What is in memory while the main thread works on a layer."""
        kept = {"activations of the workers": self.tokens * self.sizes.per_token} if self.workers > 1 else {}
        return {**self.layer, **kept}

    @property
    def layer(self) -> dict[str, int]:
        """The weights of a layer."""
        return {PROCESS: TORCH, "one layer in float32": FLOAT * self.sizes.resident}

    def tracing(self) -> Step:
        """`trace_layer`: inputs and outputs of every linear for one sequence stay until it ends."""
        s = self.sizes
        kept = FLOAT * self.seq_len * sum(g.width + sum(g.outs) for g in s.groups)
        return Step("finding the inputs of linears", {**self.held, "inputs and outputs": kept,
                                                      "activations": self.seq_len * s.per_token})

    def gathering(self, matrices: int, groups_at_once: bool = False) -> Step:
        """`LayerRun.gather`: every worker has its own sums. matrices: [in, in] of a group (the Hessian; with a reference the
        drift and its Hessian).  groups_at_once: the sums of all groups are made in one run."""
        squares = [g.square for g in self.sizes.groups]
        sums = matrices * self.workers * (sum(squares) if groups_at_once else max(squares))
        return Step("gathering statistics", {**self.layer, "sums": sums, "activations": self.tokens * self.sizes.per_token})


def gptq_work(g: Group, block: int, kinds: int, run: int) -> int:
    """`QuantizePass.change` and `gptq` on a group whose linears have one type, at their fullest moment.

    block: weights that share a factor.  kinds: factors of a block (2 with a minimum).  run: weights that share a scale.
    n: bytes of [in, in], w: of all weights.  The target and its copy for gptq are there in every moment (2 w), and the
    Hessian (n)."""
    n, w = g.square, g.weights
    part = w * min(1.0, ROWS / sum(g.outs))  # `search` and `least_squares` take ROWS rows at once
    system = FLOAT * (kinds * g.width // block) ** 2 * min(ROWS, sum(g.outs))  # `_least_squares`: A
    moments = (
        2 * n + n + 2 * n + 3 * w,  # compensate: drift and its Hessian, W; ridge and factor; W', W D and the solution
        n + 2 * n + 3 * w,  # damped: the reordered Hessian and its factor; W transposed
        # search: factor, and in W's order; candidates; `metric`: a run's inverse in float32 and, twice, in float64
        3 * n + 3 * w + (5 + 10 / block) * part + (w > part) * part + 5 * FLOAT * g.width * run,
        3 * n + 5 * w,  # sweep: factor, and divided by its diagonal; W in the order of the sweep, codes
        n + 10 * w,  # refine, new factors: W, codes; values and gradient before, after, and the better ones
        # refit in the second turn: W, codes, values and gradient twice; units; then two products and A, or one and A's copies
        n + 8 * w + kinds * w + max(2 * part + system, part + 4 * system) + 10 * w / block,
    )
    return int(max(moments))


def rtn_work(g: Group, kinds: int) -> int:
    """`rtn` on the largest linear: W transposed, the diagonal Hessian, candidates (`search`), codes and values."""
    part = g.largest * min(1.0, ROWS / max(g.outs))
    return int(g.square + 3 * g.largest + (5 + kinds) * part)


def sparsegpt_work(g: Group) -> int:
    """`MaskPass.change` with SparseGPT, one linear after the other under one Hessian. n, w, one: as in `gptq_work`, and of
    one linear. The targets of all linears are there in every moment (w)."""
    n, w, one = g.square, g.weights, g.largest
    moments = (
        2 * n + n + 2 * n + 4 * w,  # compensate
        n + 2 * n + w,  # damped
        3 * n + w + 3 * one,  # sweep: factor, and divided by its diagonal; goal, W, mask
        2 * n + w + 9 * one,  # reconstruct: goal, W, mask, the vectors of conjugate gradients and two products
    )
    return max(moments)


def judging(s: Sizes, held_tokens: int, seq_len: int, run: Running) -> list[Step]:
    """`judge`: both models run layer by layer, and their heads on half a sequence at a time. held_tokens: of all held-out
    sequences."""
    states = 2 * FLOAT * s.hidden * held_tokens
    logits = FLOAT * s.vocabulary * (seq_len // 2)
    return [
        Step("judging, layers", {**run.layer, "states": states, "activations": run.tokens * s.per_token}),
        # each head is a float32 copy of what is stored, and the embedding is there for it
        Step("judging, heads", {PROCESS: TORCH, "states": states, "heads and embeddings": 2 * (FLOAT + s.element) * s.head,
                                "logits": 2 * logits + rows_of_logits(s.vocabulary)}),
    ]


def rows_of_logits(vocabulary: int) -> int:
    """`metrics.divergence`: 32 rows of logits at a time: two log-softmaxes, their exponentials and sums in float64."""
    return 32 * vocabulary * (6 * FLOAT + 8)


def removing(s: Sizes, seq_len: int) -> Step:
    """`drop_by_kl`, after `loading`: the whole model; the outputs of all layers, twice; logits of half a sequence, and what
    `divergence` makes of them: two log-softmaxes, their difference, exponential and product."""
    logits = FLOAT * s.vocabulary * (seq_len // 2)
    return Step("measuring the model without each layer", {
        PROCESS: TORCH, **whole_model(s), "outputs of layers": 3 * FLOAT * s.hidden * s.layers * seq_len,
        "activations": seq_len * s.per_token, "logits": 7 * logits})
