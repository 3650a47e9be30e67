"""The decoder's graph: onnxruntime-genai's model builder makes it from a model without weights (skeleton.py), and llmc adds
its own nodes where the builder would add a matrix.

Where the builder takes a number from another place than transformers does (the epsilon of a norm, the table of a rotary
embedding, the factor of the embedding), llmc gives it the number of the model itself.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import onnx_ir as ir
import torch
from torch import nn

from llmc.export.onnx import builder, emit, rope
from llmc.export.onnx.norms import Norm, norm_of
from llmc.export.onnx.skeleton import Skeleton
from llmc.export.onnx.weights import Weights
from llmc.export.windows import window_of
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.hf import quiet_transformers
from llmc.formats.mixture import is_fused
from llmc.runtimes.onnx_session import moe_activations


class Builder:
    """A mixin for the builder's classes: it overrides the methods that add a matrix, and those that add a wrong number."""

    llmc_weights: ClassVar[Weights]
    llmc_skeleton: ClassVar[Skeleton]
    llmc_emit: ClassVar[emit.Emitter]
    _in_router = False
    moe_attrs: dict[str, Any]  # the builder's
    _experts: tuple[dict[str, Any], dict[str, str]]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        me: Any = self
        if me.embed_attrs["scale"] == round(me.hidden_size**0.5, 2):  # Gemma's factor, which the builder rounds
            me.embed_attrs["scale"] = me.hidden_size**0.5
        if self.llmc_skeleton.rotary is None:
            me.attention_attrs |= {"rope": False, "use_rope_in_attn": False}

    def make_rope_init(self, config: Any) -> None:
        """Set what depends on the type of the rotary embedding; its table is transformers' where one table is enough."""
        if not (isinstance(getattr(self.llmc_skeleton.rotary, "inv_freq", None), torch.Tensor) and rope.by_length(
                config.to_dict())):
            super().make_rope_init(config)  # type: ignore[misc]

    def make_rotary_embedding_caches_from_scratch(self) -> Any:
        """cos and sin float32 [context, rotated channels or half of them]."""
        rotary: Any = self.llmc_skeleton.rotary
        inverse = getattr(rotary, "inv_freq", None)
        if not isinstance(inverse, torch.Tensor):  # one for each type of layer
            return super().make_rotary_embedding_caches_from_scratch()  # type: ignore[misc]
        angles = torch.outer(torch.arange(self.rope_attrs["cache_length"], dtype=torch.float32),  # type: ignore[attr-defined]
                             inverse.float())
        angles = torch.cat((angles, angles), -1)
        return angles.cos() * rotary.attention_scaling, angles.sin() * rotary.attention_scaling

    def load_weights(self, _input_path: str) -> nn.Module:
        return self.llmc_skeleton.model

    def is_layer(self, module: nn.Module) -> bool:
        """Whether a module is a decoder layer. The builder goes by the name of its class."""
        return any(module is layer for layer in self.llmc_skeleton.decoder_layers)

    def has_lm_head(self, module: nn.Module) -> bool:
        """Whether a module is the head. The builder takes every linear with as many rows as the vocabulary for it."""
        return module is self.llmc_skeleton.model.get_output_embeddings()

    def make_embedding(self, embedding: torch.Tensor) -> None:
        """Add the embedding of tokens. The builder takes every table with as many rows as the vocabulary for it."""
        if embedding is self.llmc_skeleton.model.get_input_embeddings().weight:
            super().make_embedding(embedding)  # type: ignore[misc]

    def save_model(self, _out_dir: str) -> None:
        """llmc writes the model itself (writer.py)."""

    def save_processing(self, *_args: Any) -> None:
        """llmc copies the tokenizer itself (files.py)."""

    def make_layernorm(self, layer_id: int, layernorm: Any, skip: bool, simple: bool, location: str) -> None:
        """Add a norm of the kind that the module is, with its epsilon."""
        kind: Norm = norm_of(layernorm, self.hidden_size)  # type: ignore[attr-defined]
        self.layernorm_attrs["epsilon"] = kind.epsilon  # type: ignore[attr-defined]
        super().make_layernorm(layer_id, layernorm, skip, not kind.centred, location)  # type: ignore[misc]

    def make_attention(self, layer_id: int, attention: Any, root_input: str, **kwargs: Any) -> None:
        if attention is None:  # Granite's hybrids; the builder takes every layer for one with attention
            kind = self.layer_types[layer_id]  # type: ignore[attr-defined]
            raise NotImplementedError(f"layer {layer_id} has no attention but is a {kind} layer, for which it has no code")
        super().make_attention(layer_id, attention, root_input, **kwargs)  # type: ignore[misc]

    def make_attention_input_proj(self, layer_id: int, attention: Any, root_input: str, **kwargs: Any) -> None:
        """Add the products of queries, keys and values, and OLMo's limit for them, which the builder leaves out."""
        me: Any = self
        me.attention_attrs |= {"k_path": "", "v_path": ""}  # of an earlier layer, if all are one product here
        super().make_attention_input_proj(layer_id, attention, root_input, **kwargs)  # type: ignore[misc]
        limit: Any = getattr(self.llmc_skeleton.model.config, "clip_qkv", None)
        for path in ("q_path", "k_path", "v_path") if limit is not None else ():
            if value := me.attention_attrs[path]:
                name = f"/model/layers.{layer_id}/attn/{path}/Clip"
                bounds = [f"/model/constants/FLOAT/{x}" for x in (-float(limit), float(limit))]
                me.make_clip(name, [value, *bounds], dtype=me.io_dtype, shape=me.values[value].shape)
                me.attention_attrs[path] = f"{name}/output_0"

    def make_moe_router(self, layer_id: int, moe: Any, root_input: str) -> Any:
        self._in_router = True
        try:
            return super().make_moe_router(layer_id, moe, root_input)  # type: ignore[misc]
        finally:
            self._in_router = False

    def make_moe_preprocessing(self, layer_id: int, moe: Any, root_input: Any = None) -> None:
        kind = self.moe_attrs["activation_type"]
        if kind not in moe_activations():  # Gemma 4's, which the CUDA provider alone has
            raise NotImplementedError(f"ONNX Runtime's operator for experts has no activation {kind}")
        super().make_moe_preprocessing(layer_id, moe, root_input)  # type: ignore[misc]

    def make_moe_expert_initializers(self, layer_id: int, _experts: Any, gate_up_weight: torch.Tensor,
                                     down_weight: torch.Tensor) -> None:
        """Add the matrices of all experts of a layer, [experts, N, K] in the order of the operator's rows."""
        stacks = self.llmc_skeleton.rows.stack(gate_up_weight), self.llmc_skeleton.rows.stack(down_weight)
        for stack in stacks:
            self.llmc_skeleton.rows.place(stack.pieces)
        self._experts = self.llmc_emit.experts(self, f"/model/layers.{layer_id}/moe/experts", stacks)

    def make_moe_op(self, name: str, **kwargs: Any) -> None:
        attributes, inputs = self._experts
        before = self.moe_attrs
        self.moe_attrs = before | attributes
        super().make_moe_op(name, **{**kwargs, **inputs})  # type: ignore[misc]
        self.moe_attrs = before

    def make_attention_qk_rope_and_norm(self, layer_id: int, attention: Any, **kwargs: Any) -> Any:
        """Add the norms of heads and the rotary embedding, which SmolLM3 has in some layers only."""
        attributes = self.attention_attrs  # type: ignore[attr-defined]
        rope = attributes["rope"]
        attributes["rope"] = rope and bool(getattr(attention, "use_rope", True))
        try:
            return super().make_attention_qk_rope_and_norm(layer_id, attention, **kwargs)  # type: ignore[misc]
        finally:
            attributes["rope"] = rope

    def make_matmul_float(self, matmul: Any, name: str, root_input: str, **kwargs: Any) -> str:
        """Add a product. name: like '/model/layers.0/mlp/up_proj/MatMul'; its output is `name`/output_0 or 'logits'."""
        output = "logits" if kwargs.get("logits") else f"{name}/output_0"
        pieces = self.llmc_skeleton.rows.pieces(matmul.weight)
        if self._in_router:
            self.llmc_weights.exact |= {p.module for p in pieces if p.module not in self.llmc_weights.linears}
        self.llmc_skeleton.rows.place(pieces)
        self.llmc_emit.matmul(self, name, root_input, output, pieces)
        shape = self.make_hidden_state_shape(  # type: ignore[attr-defined]
            seq_dim=kwargs.get("seq_dim", "sequence_length"), last_dim=matmul.weight.shape[0])
        self.make_value(output, self.io_dtype, shape=shape)  # type: ignore[attr-defined]
        return name

    def make_embedding_lookup(self, embedding: torch.Tensor, basename: str, _lm_head: Any) -> str:
        pieces = self.llmc_skeleton.rows.pieces(embedding)
        if not self.llmc_weights.tied:  # if tied, the head places the same rows
            self.llmc_skeleton.rows.place(pieces)
        return self.llmc_emit.lookup(self, basename, pieces)

    def is_qkv_projection_packable(self, layer_id: int, attention: Any) -> bool:
        linears = (attention.q_proj, attention.k_proj, attention.v_proj)
        forms = {str(self.llmc_weights.form_of(self.llmc_skeleton.rows.pieces(m.weight))) for m in linears}
        return len(forms) == 1 and bool(super().is_qkv_projection_packable(layer_id, attention))  # type: ignore[misc]


def build(ckpt: Checkpoint, hf: Any, weights: Weights, skeleton: Skeleton, emitter: emit.Emitter, work: Path) -> ir.Model:
    """Build the graph without the data of its matrices; also write genai_config.json into `work`. hf: the text config."""
    parts = {"llmc_weights": weights, "llmc_skeleton": skeleton, "llmc_emit": emitter}

    def subclass(cls: type) -> type:
        return type(f"Llmc{cls.__name__}", (Builder, cls), parts)

    with torch.no_grad(), quiet_transformers():
        made = builder.make(builder.name_of(ckpt.config), _as_the_builder_reads(hf, skeleton), subclass, work)
    skeleton.rows.check_complete()
    made.model.graph.sort()
    made.stamp_build_metadata(made.model)
    return made.model  # type: ignore[no-any-return]


def windowed(made: ir.Model) -> int:
    """The number of attention nodes with a sliding window."""
    attributes = (node.attributes.get("local_window_size") for node in made.graph)
    return sum(a is not None and a.as_int() > 0 for a in attributes)


def _as_the_builder_reads(hf: Any, skeleton: Skeleton) -> Any:
    """A copy of transformers' config with the graph's context length, and with what the builder reads elsewhere."""
    hf = copy.deepcopy(hf)
    _spread_layers(hf)
    hf.max_position_embeddings = rope.context_of(hf.to_dict())[0]
    if hasattr(hf, "original_max_position_embeddings"):  # of two rotary tables; the graph has one
        hf.original_max_position_embeddings = hf.max_position_embeddings
    by_layer_type = getattr(hf, "rope_parameters", None) or {}
    whole = by_layer_type.get("full_attention", {})
    if whole and whole["rope_type"] != "proportional":  # Gemma 3, not 4: the builder knows it as older versions had it
        hf.rope_local_base_freq = by_layer_type["sliding_attention"]["rope_theta"]
        hf.rope_parameters = dict(whole)
    if hasattr(skeleton.rotary, "mrope_section"):  # Qwen 3.5's default
        hf.rope_parameters["mrope_section"] = list(skeleton.rotary.mrope_section)
    for module in skeleton.model.modules():  # gpt-oss, whose config need not name it
        if is_fused(module) and hasattr(module, "limit"):
            hf.swiglu_limit = float(module.limit)
    if getattr(hf, "layer_types", None) is None and window_of(hf) is not None:  # transformers windows every layer
        hf.layer_types = ["sliding_attention"] * hf.num_hidden_layers
    return hf


def _spread_layers(hf: Any) -> None:
    """Give the builder the sizes of Gemma 4's heads where config.json has them, in place.

    transformers has them for each layer, and refuses to read them from the config of all layers."""
    if not getattr(hf, "is_heterogeneous", False) or "full_attention" not in hf.layer_types:
        return
    whole = hf.per_layer_config[hf.layer_types.index("full_attention")]
    hf.global_head_dim, hf.num_global_key_value_heads = whole.head_dim, whole.num_key_value_heads
    hf.allow_global_per_layer_attribute_access = True
