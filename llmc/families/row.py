"""The fields of a row of the table: the facts about a family that config.json and the modules do not contain."""

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
    """llama.cpp's implementation of the architecture (src/models/*.cpp and conversion/*.py of llama.cpp): "it" below.

    name: llama.cpp's name, empty if llmc cannot write the family. activations: the values of hidden_act that it computes.
    interleaved: it rotates neighbouring rows of Q and K; transformers rotates row i with row i + head_dim / 2.
    own_head: the head may differ from the embedding.
    rope: the types of rotary scaling that it supports. partial_rotary: it can rotate a part of each head.
    window: 'ignored': it has no sliding windows; 'key': it has none, but assumes one if the file lacks the key;
    'layers': some layers have one.
    assumed: values of config.json that it assumes; a key that config.json lacks has the assumed value.
    softcaps: the soft caps of logits that it reads, and whether it requires them.
    wide_scale_layers: a model with this number of layers scales attention by hidden_size / heads, all others by head_dim.
    seventy_from: with at least this number of query heads for each key head, llama-quantize treats 80 layers as "70B" and
    uses another mix of types; 0: never.
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
class Family:
    """One family. Module names are names in a decoder layer, except final_norm.

    model_type: of config.json (of its text part). architecture: the class in transformers.
    linears: the linear of each role (`names.ROLES`). Fused: only `attn_qkv`; only `ffn_up`, with the gate's rows first.
    attention_norm, mlp_norm: only the first linears of attention and MLP read their outputs.
    post_norms: norms of the outputs of attention and MLP. head_norms: norms of single query and key heads.
    final_norm: the norm before the head; its name in the base model.
    offset: the number that norms add to their weight. centred: norms subtract the mean (LayerNorm).
    gated: the MLP has a gate, and the activation is applied to the gate only.
    qkv_by_head: `attn_qkv` has q, k, v of head 0, then of head 1, and so on; else all of q, all of k, all of v.
    grouped: query heads share num_key_value_heads key and value heads. rotary: positions are rotary embeddings.
    transposed: float weights of linears are stored as [in, out] (Conv1D).
    scaled_embedding: the embedding is multiplied by the square root of the number of channels.
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

    def role_of(self, module: str) -> str | None:
        """The role of a module, from its full name; None if it is not a linear of a layer."""
        return next((role for role, linear in self.linears.items() if module.endswith(f".{linear}")), None)

    @property
    def norms(self) -> dict[str, tuple[str, ...]]:
        """{norm: the linears that read its output}. Nothing else reads it."""
        return {norm: tuple(self.linears[role] for role in roles if role in self.linears)
                for norm, roles in ((self.attention_norm, _ATTENTION_INPUTS), (self.mlp_norm, _MLP_INPUTS))}

    @property
    def value(self) -> str:
        """The linear that computes the values."""
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
        """The reason why the residual stream cannot be rotated; '' if it can."""
        if self.centred:
            return "its LayerNorm subtracts the mean, which a rotation does not keep"
        if self.post_norms:
            return "its norms after attention and MLP scale single channels of their outputs"
        return ""

    @property
    def unnarrowable(self) -> str:
        """The reason why layers cannot be made narrower; '' if they can."""
        if self.centred:
            return "its LayerNorm subtracts the mean of all channels"
        return "" if self.gated else "its MLP has no gate"


def activation_of(config: Any) -> str:
    """The name of the MLP's activation in a transformers config."""
    found = getattr(config, "hidden_activation", None) or getattr(config, "activation_function", None) or config.hidden_act
    return str(found)
