"""The decoder's graph. onnxruntime-genai's model builder (onnxruntime_genai/models/builders, 0.18) makes it from a model
without weights, and llmc adds its own nodes where the builder would add a matrix.

The builder joins, cuts and transposes matrices as the architecture needs it, so names do not tell which rows a node holds.
Therefore llmc gives the builder a model with row numbers as the values of its matrices (in float64, which real weights never
have). From the numbers in a node, llmc reads its pieces.
"""

from __future__ import annotations

import contextlib
import copy
import io
import sys
from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import onnx_ir as ir
import torch
from torch import nn

from llmc.errors import UserError
from llmc.export.onnx import emit, rope
from llmc.export.onnx.weights import Piece, Weights
from llmc.export.parity import PLEASE_REPORT
from llmc.families import FAMILIES, nearest, of_config
from llmc.families.row import Onnx
from llmc.formats import quantized
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.contents import is_buffer
from llmc.formats.ends import ends_of
from llmc.formats.hf import empty_model
from llmc.formats.names import Names, missing
from llmc.runtimes.onnx_session import genai_library


def find_architecture(config: dict[str, Any]) -> Onnx:
    """The builder's names for the family of a config.json; raises UserError if the builder does not support it."""
    name = (config.get("architectures") or [f"model_type {config.get('model_type')}"])[0]
    family = of_config(config)
    if family is None or not family.onnx.builder:
        known = [f.architecture for f in FAMILIES.values() if f.onnx.builder]
        raise UserError(f"llmc does not write {name} as ONNX; it writes {', '.join(known)}{nearest(name, known)}",
                        "export it as GGUF (--format gguf), or evaluate the folder itself")
    return family.onnx


class Rows:
    """Gives numbers to the rows of all matrices, and finds the pieces that a node holds."""

    def __init__(self) -> None:
        self.modules: list[str] = []
        self.starts = [0]  # the first row number of each matrix, and of the next one
        self.placed: dict[str, list[tuple[int, int]]] = {}

    def numbered(self, module: str, shape: torch.Size) -> nn.Parameter:
        """A matrix float64 [N, K] whose row i has its row number in every column. It takes the memory of one column."""
        start = self.starts[-1]
        numbers = torch.arange(start, start + shape[0], dtype=torch.float64)
        self.modules.append(module)
        self.starts.append(start + shape[0])
        return nn.Parameter(numbers[:, None].expand(*shape), requires_grad=False)

    def pieces(self, w: torch.Tensor) -> list[Piece]:
        """The pieces of a node's matrix w [N, K], in order. A piece is a range of rows of one matrix."""
        if w.dtype != torch.float64 or not torch.equal(w[:, 0], w[:, -1]):
            raise UserError("the model builder has changed the columns of a matrix", PLEASE_REPORT)
        numbers = w[:, 0].long()
        cuts = [0, *((numbers.diff() != 1).nonzero()[:, 0] + 1).tolist(), len(numbers)]
        found: list[Piece] = []
        for a, b in pairwise(cuts):
            number, end = int(numbers[a]), int(numbers[b - 1]) + 1
            while number < end:  # a range of numbers may cross from one matrix into the next
                i = bisect_right(self.starts, number) - 1
                stop = min(end, self.starts[i + 1])
                found.append(Piece(self.modules[i], number - self.starts[i], stop - self.starts[i]))
                number = stop
        return found

    def place(self, pieces: list[Piece]) -> None:
        for p in pieces:
            self.placed.setdefault(p.module, []).append((p.start, p.stop))

    def check_complete(self) -> None:
        """Raise UserError unless every row of every matrix is in the graph exactly once."""
        for module, (start, end) in zip(self.modules, pairwise(self.starts), strict=True):
            at = 0
            for first, stop in sorted(self.placed.get(module, [])):
                at = stop if first == at else -1
            if at != end - start:
                raise UserError(f"the model builder does not put every row of {module} into the graph once", PLEASE_REPORT)


class Builder:
    """A mixin for the builder's classes: it overrides the methods that add a matrix."""

    llmc_weights: ClassVar[Weights]
    llmc_rows: ClassVar[Rows]
    llmc_model: ClassVar[nn.Module]
    llmc_emit: ClassVar[emit.Emitter]

    def make_rope_init(self, config: Any) -> None:
        """If the rotary embedding depends on the text's length, use transformers' one for short texts."""
        if not rope.by_length(config.to_dict()):
            super().make_rope_init(config)  # type: ignore[misc]
            return
        rotary: Any = self.llmc_model.base_model.rotary_emb  # type: ignore[union-attr]
        attributes = self.rope_attrs  # type: ignore[attr-defined]
        steps = torch.arange(0, 2 * len(rotary.inv_freq), 2, dtype=torch.float32) / (2 * len(rotary.inv_freq))
        attributes["rescale_factors"] = 1 / (rotary.inv_freq * attributes["theta"] ** steps)
        attributes["mscale"] = rotary.attention_scaling

    def load_weights(self, _input_path: str) -> nn.Module:
        return self.llmc_model

    def make_matmul_float(self, matmul: Any, name: str, root_input: str, **kwargs: Any) -> str:
        """Add a product. name: like '/model/layers.0/mlp/up_proj/MatMul'; its output is `name`/output_0 or 'logits'."""
        output = "logits" if kwargs.get("logits") else f"{name}/output_0"
        pieces = self.llmc_rows.pieces(matmul.weight)
        self.llmc_rows.place(pieces)
        self.llmc_emit.matmul(self, name, root_input, output, pieces)
        shape = self.make_hidden_state_shape(  # type: ignore[attr-defined]
            seq_dim=kwargs.get("seq_dim", "sequence_length"), last_dim=matmul.weight.shape[0])
        self.make_value(output, self.io_dtype, shape=shape)  # type: ignore[attr-defined]
        return name

    def make_embedding_lookup(self, embedding: torch.Tensor, basename: str, _lm_head: Any) -> str:
        pieces = self.llmc_rows.pieces(embedding)
        if not self.llmc_weights.tied:  # if tied, the head places the same rows
            self.llmc_rows.place(pieces)
        return self.llmc_emit.lookup(self, basename, pieces)

    def is_qkv_projection_packable(self, layer_id: int, attention: Any) -> bool:
        linears = (attention.q_proj, attention.k_proj, attention.v_proj)
        forms = {str(self.llmc_weights.form_of(self.llmc_rows.pieces(m.weight))) for m in linears}
        return len(forms) == 1 and bool(super().is_qkv_projection_packable(layer_id, attention))  # type: ignore[misc]


@dataclass(frozen=True)
class Ends:
    """The ends of the model: module names of embedding and head in the checkpoint, the same if they are one matrix.

    spare: a head tensor that is a copy of the embedding."""

    embedding: str
    head: str
    spare: str | None = None


def skeleton(ckpt: Checkpoint, hf: Any) -> tuple[nn.Module, Rows, Ends]:
    """The model with row numbers as matrices and real norms and biases; the row numbers; the names of embedding and head."""
    model = empty_model(hf)
    names = Names.of(ckpt, model, quantized.linears(ckpt))
    ends = _find_ends(ckpt, model, names)
    rows, numbered, used = Rows(), dict[str, nn.Parameter](), {ends.spare}
    for name, p in list(model.named_parameters(remove_duplicate=False)):
        owner = model.get_submodule(name.rpartition(".")[0])
        is_head = owner is model.get_output_embeddings() and name.endswith(".weight")
        found = names.locate(f"{ends.head}.weight" if is_head else name)
        if found is None:
            raise missing(ckpt.folder, name)
        stored, is_codes = found.name, found.is_codes
        used.update(quantized.parts(stored) if is_codes else [stored])
        if p.ndim == 2 and isinstance(owner, nn.Linear | nn.Embedding):
            module = stored if is_codes else stored.removesuffix(".weight")
            shape = quantized.shape(ckpt, stored) if is_codes else ckpt.shape(stored)
            if tuple(shape) != tuple(p.shape):
                raise UserError(f"{stored} has shape {list(shape)}, config.json says {list(p.shape)}",
                                "the checkpoint and its config.json do not belong together")
            if module not in numbered:
                numbered[module] = rows.numbered(module, p.shape)
            value = numbered[module]
        elif p.ndim == 1:
            value = nn.Parameter(ckpt.tensor(stored).to(torch.float32), requires_grad=False)
        else:
            raise UserError(f"{name} has {p.ndim} axes: no ONNX graph is known for such models", "export it as GGUF")
        setattr(owner, name.rpartition(".")[2], value)
    _refuse_leftovers(ckpt, used)
    return model.eval(), rows, ends


def _find_ends(ckpt: Checkpoint, model: Any, names: Names) -> Ends:
    """Find embedding and head. The tensors decide whether they are tied; raises UserError if config.json contradicts them."""
    found, embedding = ends_of(ckpt, model, names)
    one = embedding.name.removesuffix(".weight")
    if found.head is None:
        return Ends(one, one)
    return Ends(one, one, found.head) if found.one else Ends(one, found.head.removesuffix(".weight"))


def _refuse_leftovers(ckpt: Checkpoint, used: set[str | None]) -> None:
    """Raise UserError for a tensor that the model does not use. Buffers and AutoGPTQ's zero biases may be left over."""
    for name in ckpt.names():
        if name not in used and not is_buffer(name, ckpt.shape(name)) and not (
                name.endswith(".bias") and not bool(ckpt.tensor(name).any())):
            raise UserError(f"{name} of {ckpt.folder} has no place in the model that its config.json names",
                            "the checkpoint holds tensors that its architecture does not have")


def build(ckpt: Checkpoint, hf: Any, weights: Weights, model: nn.Module, rows: Rows,
          emitter: emit.Emitter, work: Path) -> ir.Model:
    """Build the graph without the data of its matrices; also write genai_config.json into `work`."""
    builders = _builders()
    names = find_architecture(ckpt.config)
    base = getattr(builders, names.builder)
    name = f"Llmc{base.__name__}"
    cls = type(name, (Builder, base), {"llmc_weights": weights, "llmc_rows": rows, "llmc_model": model,
                                       "llmc_emit": emitter})
    # every layer's cache is as long as the context, so any runtime can feed it; windowed layers still attend to their window
    options = {"hf_token": False, "hf_remote": False, "shared_embeddings": False, "windowed_kv_cache": False}
    hf = _as_the_builder_reads(hf)
    try:
        with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            made = cls(hf, ir.DataType.FLOAT, ir.DataType.FLOAT, "cpu", str(work / "cache"), options)
            if names.genai_type:
                made.model_type = names.genai_type
            made.make_model(str(ckpt.folder))
            made.make_genai_config(hf, {}, str(work))
    except (NotImplementedError, AttributeError, KeyError, ValueError) as e:
        raise UserError(f"the model builder cannot build {ckpt.folder}: {e!r}",
                        "export it as GGUF (--format gguf), or please report this with the model's name") from e
    rows.check_complete()
    made.model.graph.sort()
    made.stamp_build_metadata(made.model)
    return made.model


def windowed(made: ir.Model) -> int:
    """The number of attention nodes with a sliding window."""
    attributes = (node.attributes.get("local_window_size") for node in made.graph)
    return sum(a is not None and a.as_int() > 0 for a in attributes)


def _as_the_builder_reads(hf: Any) -> Any:
    """A copy of transformers' config with the graph's context length.

    transformers 5 has Gemma 3's rotary bases in a dict for each layer type; they move to the keys that the builder reads."""
    hf = copy.deepcopy(hf)
    if rope.by_length(hf.to_dict()):
        hf.max_position_embeddings = hf.original_max_position_embeddings = rope.context_of(hf.to_dict())[0]
    by_layer_type = getattr(hf, "rope_parameters", None) or {}
    if "sliding_attention" in by_layer_type and "full_attention" in by_layer_type:
        hf.rope_local_base_freq = by_layer_type["sliding_attention"]["rope_theta"]
        hf.rope_parameters = dict(by_layer_type["full_attention"])
    return hf


def _builders() -> Any:
    """Import the builder's modules. They add their folder to sys.path to import each other; this restores sys.path."""
    before = list(sys.path)
    try:
        genai_library()
        from onnxruntime_genai.models import builders

        return builders
    except ImportError as e:  # 0.18 imports classes that transformers 4.57 lacks
        raise UserError(f"onnxruntime-genai's model builder does not load: {e}",
                        "it needs transformers 5: use an environment without the extra 'optimum'") from e
    finally:
        sys.path[:] = before
