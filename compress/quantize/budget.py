"""Choose a type for every matrix of a model, embedding and head included, within a budget: `--target-size`, `-bpw`, `-kld`.

    predicted KL divergence  =  sum_l  a_l t_l^2(type of l) g_l

a_l and t_l are measured (sensitivity.py); g_l is the share of the divergence that remains with GPTQ. The choice has the least
divergence for the bytes, or the fewest bytes for the divergence (knapsack.py). The measurements are stored in the working
folder.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmc import closure
from llmc.compress.memory import Sizes, loading
from llmc.compress.quantize import sensitivity
from llmc.compress.quantize.assignment import (
    Assignment,
    assign,
    embedding_shape,
    has_own_head,
    type_called,
    types_by_name,
)
from llmc.compress.quantize.config import QuantizeConfig
from llmc.compress.quantize.knapsack import Frontier, Option
from llmc.compress.quantize.memory import measuring
from llmc.compress.sampling import sample_from_model
from llmc.compress.skeleton import Skeleton, linears_of
from llmc.compress.text import SELF, load_calibration
from llmc.compress.zeros import mask_of
from llmc.console import parse_size, progress, say, size
from llmc.errors import UserError
from llmc.families.names import classify
from llmc.files import read_note, write_note
from llmc.formats import types as block_types
from llmc.formats.hf import load_tokenizer, load_torch_model
from llmc.formats.linears import get_weight
from llmc.formats.manifest import NOTES
from llmc.formats.mixture import unfuse
from llmc.formats.source import origin_of
from llmc.machine import torch_device
from llmc.memory import Memory
from llmc.precision import fast_matmul, matmul_precision

if TYPE_CHECKING:
    from llmc.export.gguf.size import Outside  # needs the gguf package

SEQUENCES, LENGTH = 4, 256  # number and length of the sequences for the sensitivities
# KL divergence with GPTQ as a share of that with rounding to nearest. SmolLM2-135M in Q4_0: on WikiText-2 valid 0.101 with
# GPTQ and 0.359 with rounding, on a technical text 0.117 and 0.364. It scales the prediction for linears alone, because GPTQ
# does not quantize embedding and head.
GPTQ_GAIN = 0.3
ENDS = ("embedding", "head")


@dataclass(frozen=True)
class Matrix:
    """A matrix that gets a type, or the matrices of all experts of a layer, which are one tensor in a file. name: in the
    model, with * for the experts' numbers, or one of ENDS.  shape: [out, in], out over all experts.  first: its decoder layer
    (0 for the embedding, the number of layers for the head).  parts: names of its modules in the model."""

    name: str
    shape: tuple[int, int]
    first: int
    parts: tuple[str, ...]

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]

    def nbytes(self, qtype: str) -> int:
        return self.weights // block_types.BLOCK_TYPES[qtype].block * block_types.BLOCK_TYPES[qtype].block_bytes


def assign_to_budget(config: QuantizeConfig, skeleton: Skeleton, source: dict[str, Any]) -> Assignment:
    """The best types for `config.target`. source: the manifest's description of the model. UserError if no types meet the
    target."""
    matrices = matrices_of(skeleton)
    # before the measurement, because a preset can be refused
    peer = types_of(config.peer, config, skeleton) if config.peer else {}
    found = [f"{part}.weight" for m in matrices.values() for part in m.parts]
    stored = skeleton.names.replaced(n for n in found if skeleton.names.locate(n) is not None)  # a tied head has none
    outside = _outside(skeleton, origin_of(skeleton.checkpoint.folder, source), stored)
    named = {skeleton.starred(n): qtype for n, qtype in types_by_name(config, skeleton).items()}
    measured = _measured(config, skeleton, source, matrices, {*peer.values(), *named.values()})
    options = {name: _options(m, measured[name], config.method) for name, m in matrices.items()}
    keep = mask_of(skeleton.checkpoint.folder) is not None and not config.lose_zeros
    allowed = {name: [o for o in found if o.name == named.get(name, o.name) and (
                   name in ENDS or block_types.BLOCK_TYPES[o.name].holds_zero or not keep)]
               for name, found in options.items()}
    if lost := [name for name, some in allowed.items() if not some]:
        raise UserError(f"--type-of: {lost[0]} cannot have the type {named.get(lost[0])}",
                        f"its rows of {matrices[lost[0]].shape[1]} weights fit {', '.join(o.name for o in options[lost[0]])}")
    equal = {name: next(o for o in options[name] if o.name == qtype) for name, qtype in peer.items()}
    parameters = sum(m.weights for m in matrices.values()) + outside.parameters
    chosen = _solve(config, Frontier(allowed), outside, parameters, equal)
    types = {part: type_called(o.name) for name, o in chosen.items() if name not in ENDS for part in matrices[name].parts}
    end_types = {name: o.name for name, o in chosen.items() if name in ENDS}
    plan = _describe(config, matrices, chosen, measured, outside, parameters)
    if config.peer:
        plan["peer"] = {"preset": config.peer, "file_bytes": _nbytes(equal) + outside.tensors + outside.rest,
                        "predicted_kld": _loss(equal)}
    return Assignment(str(config.target).removeprefix("--"), types, {}, end_types, plan)


def types_of(preset: str, config: QuantizeConfig, skeleton: Skeleton) -> dict[str, str]:
    """{name of the matrix, as in `matrices_of`: the type that a preset gives it}."""
    mix = assign(QuantizeConfig(preset=preset, method=config.method), skeleton)
    return {**mix.end_types, **{skeleton.starred(name): str(t.gguf_type).lower() for name, t in mix.types.items()}}


def matrices_of(skeleton: Skeleton) -> dict[str, Matrix]:
    """Every matrix that gets a type, by name, in the order in which the model runs them. UserError if no type fits one."""
    rows, width = embedding_shape(skeleton)
    ends = (skeleton.model.get_input_embeddings(), skeleton.model.get_output_embeddings())
    embedding, head = (next(n for n, m in skeleton.model.named_modules() if m is end) for end in ends)
    found = [Matrix("embedding", (rows, width), 0, (embedding,))]
    stacks: dict[str, Matrix] = {}
    for layer, name, module in linears_of(skeleton):
        out, width_in = get_weight(module).shape
        before = stacks.get(key := skeleton.starred(name), Matrix(key, (0, width_in), layer, ()))
        stacks[key] = replace(before, shape=(before.shape[0] + out, width_in), parts=(*before.parts, name))
    found += stacks.values()
    if has_own_head(skeleton):
        found.append(Matrix("head", (rows, width), len(skeleton.layers), (head,)))
    if uneven := [m for m in found if not sensitivity.candidates(m.shape[1])]:
        raise UserError(f"rows of {uneven[0].shape[1]} weights ({uneven[0].name}) fit no GGUF type",
                        "a budget needs rows that are a multiple of 32: use --bits")
    return {m.name: m for m in found}


def _outside(skeleton: Skeleton, source: dict[str, Any], matrices: set[str]) -> Outside:
    """The bytes of the file that do not depend on the choice: other tensors, metadata, and the gaps between tensors."""
    try:
        from llmc.export.gguf.size import outside
    except ImportError as e:
        raise UserError(f"--target-size, -bpw and -kld plan a .gguf file and need the package {e.name}",
                        "pip install 'llmc-toolkit[gguf]'") from e
    return outside(skeleton.checkpoint.folder, source, matrices)


# ----------------------------------------------------------------------------------------------------------- measuring


def _measured(config: QuantizeConfig, skeleton: Skeleton, source: dict[str, Any],
              matrices: dict[str, Matrix], named: Collection[str]) -> dict[str, dict[str, Any]]:
    """{name: {'sensitivity': a, 'errors': {qtype: t²}}} of every matrix, measured now or read from the file of an earlier
    run. named: types that the options name."""
    length = min(LENGTH, config.seq_len)
    tokenizer = load_tokenizer(skeleton.checkpoint.folder)
    key: dict[str, Any] = {"source": source["files"], "sequences": SEQUENCES, "length": length, "noise": sensitivity.NOISE,
                           "code": closure.digest(__name__), "device": config.device, "torch": torch.__version__,
                           "transformers": version("transformers"), "matmul": matmul_precision()}
    if books := sorted(name for name in named if block_types.BLOCK_TYPES[name].codebook):
        key["codebooks"] = books
    ids = None
    if config.calibration == SELF:
        key |= {"calibration": SELF, "seed": config.seed, "threads": torch.get_num_threads()}
    else:
        text = load_calibration(config.calibration, tokenizer, SEQUENCES, length,
                                skeleton.model.get_input_embeddings().weight.shape[0])
        ids, key["calibration"] = text.sequences, hashlib.sha256(text.sequences.numpy().tobytes()).hexdigest()
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    kept = Path(NOTES) / f"sensitivity-{digest[:16]}.json"
    found: dict[str, dict[str, Any]] = read_note(kept)
    if found:
        say(f"using the sensitivities of an earlier run: {kept}")
        return found
    if config.device == "cpu":
        steps = (loading(Sizes.of(skeleton)), measuring(skeleton, SEQUENCES, length))
        Memory(steps).check("quantizing to a budget", "choose the types with --preset")
    model = load_torch_model(skeleton.checkpoint.folder, str(torch_device(config.device)), torch.float32)
    unfuse(model, skeleton.names.leaves)
    if ids is None:  # another seed than GPTQ's calibration text has
        ids = sample_from_model(model, tokenizer, SEQUENCES, length, config.seed + 1, SEQUENCES)
    found = measure(model, skeleton.layers_name, ids, list(matrices.values()), books)
    write_note(kept, found)
    return found


def measure(model: nn.Module, layers: str, ids: torch.Tensor, matrices: list[Matrix],
            named: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """Measure sensitivity and errors of all matrices. Returns them by `Matrix.name`.  named: types with codebooks that are
    measured too."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    with torch.no_grad(), fast_matmul(), progress("measuring the sensitivity of matrix", len(matrices)) as p:
        probe = sensitivity.Probe(model, layers, ids)
        for matrix in matrices:
            modules = [model.get_submodule(name) for name in matrix.parts]
            weights = [m.weight.data if isinstance(m, nn.Embedding) else get_weight(m) for m in modules]
            found[matrix.name] = {"sensitivity": probe.sensitivity(weights, matrix.first, generator),
                                  "errors": sensitivity.errors(weights, sensitivity.candidates(matrix.shape[1], named))}
            p.step(matrix.name)
    return found


# ------------------------------------------------------------------------------------------------------------ choosing


def _options(m: Matrix, measured: dict[str, Any], method: str) -> list[Option]:
    """The types that a matrix can have, each with its bytes in the file and its predicted KL divergence."""
    from llmc.export.gguf.size import in_file

    gain = GPTQ_GAIN if method == "gptq" and m.name not in ENDS else 1.0
    return [Option(qtype, in_file(m.nbytes(qtype)), max(0.0, measured["sensitivity"]) * t2 * gain)
            for qtype, t2 in measured["errors"].items()]


def _solve(config: QuantizeConfig, frontier: Frontier, outside: Outside, parameters: int,
           equal: dict[str, Option]) -> dict[str, Option]:
    """The best choice for the target. UserError if none meets it; the error states the nearest target that one meets. equal:
    a choice whose bytes are the budget; empty if the target is a number."""
    whole = outside.tensors + outside.rest
    if config.target_kld is not None:
        if (chosen := frontier.reaching(config.target_kld)) is None:
            best = _nbytes(frontier.within(frontier.most) or {})
            least = rounded_up(float(frontier.losses[-1]))
            raise UserError(f"{config.target} cannot be reached: the lowest predicted KL divergence is {least:g}, at "
                            f"{size(best + whole)}", f"use --target-kld {least:g} or more")
        return chosen
    if config.target_size is not None or config.peer:
        allowed = _nbytes(equal) if equal else (parse_size(config.target_size or "") or 0) - whole
        smallest, shown = f"--target-size {frontier.least + whole}B", size(frontier.least + whole)
    else:
        allowed = int(float(config.target_bpw or 0) * parameters / 8) - outside.tensors
        bits = rounded_up(8 * (frontier.least + outside.tensors) / parameters)
        smallest, shown = f"--target-bpw {bits:g}", f"{bits:g} bits per weight"
    if (chosen := frontier.within(allowed)) is None:
        raise UserError(f"{config.target} cannot be reached: the smallest types give {shown}",
                        f"use {smallest} or more, or prune the model first")
    return chosen


def rounded_up(value: float) -> float:
    """`value` rounded up to four digits, so that it can be reached as a target."""
    step = 10.0 ** (math.floor(math.log10(value)) - 3) if value > 0 else 1.0
    return float(f"{math.ceil(value / step) * step:.4g}")


def _nbytes(chosen: dict[str, Option]) -> int:
    return sum(o.nbytes for o in chosen.values())


def _loss(chosen: dict[str, Option]) -> float:
    return sum(o.loss for o in chosen.values())


def _describe(config: QuantizeConfig, matrices: dict[str, Matrix], chosen: dict[str, Option],
              measured: dict[str, dict[str, Any]], outside: Outside, parameters: int) -> dict[str, Any]:
    """The plan for the manifest and for `budget_lines`. Its 'tensors' has an entry for every matrix."""
    classes: Counter[str] = Counter()
    for name, option in chosen.items():
        classes[name if name in ENDS else classify(name)] += option.nbytes
    tensor_bytes = sum(m.nbytes(chosen[name].name) for name, m in matrices.items()) + outside.tensors
    return {
        "target": config.target, "predicted_kld": _loss(chosen),
        "file_bytes": _nbytes(chosen) + outside.tensors + outside.rest, "bits_per_weight": 8 * tensor_bytes / parameters,
        "bytes_by_class": {**classes, "other": outside.tensors, "metadata": outside.rest},
        "tensors": [{"name": n, "type": o.name, "bytes": o.nbytes, "kld": o.loss, "sensitivity": measured[n]["sensitivity"],
                     "error": measured[n]["errors"][o.name]} for n, o in chosen.items()],
    }
