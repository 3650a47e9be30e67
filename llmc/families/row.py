"""What a row of the table says: what llmc must know of a family beyond what config.json and the modules tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SILU = ("silu", "swish")
GELU_TANH = ("gelu_new", "gelu_pytorch_tanh")
_ATTENTION_INPUTS = ("attn_q", "attn_k", "attn_v", "attn_qkv")
_MLP_INPUTS = ("ffn_gate", "ffn_up")


@dataclass(frozen=True)
class Gguf:
    """What llama.cpp's code for the architecture expects and computes (src/models/*.cpp and conversion/*.py of llama.cpp).

    name: llama.cpp's, empty where llmc cannot write the family.  activations: values of hidden_act that it computes.
    interleaved: it rotates neighbouring rows of Q and K, where transformers rotates row i with i + head_dim / 2.
    own_head: the head may be another matrix than the embedding.
    rope: kinds of rotary scaling that it has a place for.  partial_rotary: it can rotate a part of each head.
    window: 'ignored': it has no sliding windows; 'key': it has none either, but assumes one where the file says nothing;
    'layers': some layers have one.
    assumed: values of config.json that it takes for granted; a key that config.json lacks has them.
    softcaps: caps of logits that it reads, and whether it needs them.
    wide_scale_layers: a model of so many layers has attention scaled by hidden_size / heads, any other by head_dim.
    seventy_from: it counts 80 layers as "70B", and mixes types otherwise, from so many query heads for each head of keys on;
    0: never.
    """

    name: str = ""
    activations: tuple[str, ...] = SILU
    interleaved: bool = False
    own_head: bool = True
    rope: tuple[str, ...] = ("linear", "yarn")
    partial_rotary: bool = False
    window: str = "ignored"
    assumed: Mapping[str, Any] = field(default_factory=dict)
    softcaps: Mapping[str, bool] = field(default_factory=dict)
    wide_scale_layers: int = 0
    seventy_from: int = 0


@dataclass(frozen=True)
class Onnx:
    """builder: class of onnxruntime-genai's model builder, empty where llmc has no graph.  genai_type: what the class must be
    told to call the model, where it does not find that out."""

    builder: str = ""
    genai_type: str = ""


@dataclass(frozen=True)
class Family:
    """One family. Names of modules are those in a decoder layer, where nothing else is said.

    model_type: of config.json (of its text part).  architecture: the class in transformers.
    linears: the linear of each role (`names.ROLES`).  Fused: `attn_qkv` alone; `ffn_up` alone with the gate's rows first.
    attention_norm, mlp_norm: read by the first linears of attention and MLP, and by nothing else.
    post_norms: norms of what attention and MLP add to the stream.  head_norms: of single query and key heads.
    final_norm: before the head, by its name in the base model.
    offset: what norms add to their weight before they multiply by it.  centred: they subtract the mean (LayerNorm).
    gated: the MLP has a gate, and only the gate passes the activation.
    qkv_by_head: `attn_qkv` has q, k, v of head 0, then of head 1, …; else all of q, all of k, all of v.
    grouped: query heads may share a value head, num_key_value_heads of them.  rotary: positions are rotations.
    transposed: float weights of linears are stored [in, out] (Conv1D).
    scaled_embedding: the embedding is multiplied by the root of the number of channels.
    """

    model_type: str
    architecture: str
    linears: Mapping[str, str]
    attention_norm: str
    mlp_norm: str
    post_norms: tuple[str, ...] = ()
    head_norms: tuple[str, ...] = ()
    final_norm: str = "norm"
    offset: float = 0.0
    centred: bool = False
    gated: bool = True
    qkv_by_head: bool = False
    grouped: bool = True
    rotary: bool = True
    transposed: bool = False
    scaled_embedding: bool = False
    gguf: Gguf = Gguf()
    onnx: Onnx = Onnx()

    def role_of(self, module: str) -> str | None:
        """The role of a module by its full name; None where it is no linear of a layer."""
        return next((role for role, linear in self.linears.items() if module.endswith(f".{linear}")), None)

    @property
    def norms(self) -> dict[str, tuple[str, ...]]:
        """Each norm with the linears that are all that reads it."""
        return {norm: tuple(self.linears[role] for role in roles if role in self.linears)
                for norm, roles in ((self.attention_norm, _ATTENTION_INPUTS), (self.mlp_norm, _MLP_INPUTS))}

    @property
    def value(self) -> str:
        """The linear that makes the values."""
        return self.linears.get("attn_v") or self.linears["attn_qkv"]

    @property
    def out(self) -> str:
        return self.linears["attn_output"]

    @property
    def up(self) -> str:
        return self.linears["ffn_up"]

    @property
    def down(self) -> str:
        return self.linears["ffn_down"]

    @property
    def unrotatable(self) -> str:
        """Why the residual stream cannot be rotated, empty where it can."""
        if self.centred:
            return "its LayerNorm subtracts the mean, which a rotation does not keep"
        if self.post_norms:
            return "its norms after attention and MLP scale channels of what is added to the stream"
        return ""

    @property
    def unnarrowable(self) -> str:
        """Why layers cannot be made narrower, empty where they can."""
        if self.centred:
            return "its LayerNorm subtracts the mean of all channels"
        return "" if self.gated else "its MLP has no gate"


def activation_of(config: Any) -> str:
    """The MLP's activation by its name in a transformers config."""
    found = getattr(config, "hidden_activation", None) or getattr(config, "activation_function", None) or config.hidden_act
    return str(found)
