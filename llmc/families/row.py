"""The fields of a row of the table: the facts about a family that config.json and the modules do not contain."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

SILU = ("silu", "swish")
GELU_TANH = ("gelu_new", "gelu_pytorch_tanh")
GELU = ("gelu", *GELU_TANH)  # models that were trained with the exact GELU: llama.cpp computes the tanh form
RELU2 = ("relu2",)
_ATTENTION_INPUTS = ("attn_q", "attn_k", "attn_v", "attn_qkv")
_MLP_INPUTS = ("ffn_gate", "ffn_up")


@dataclass(frozen=True)
class Gguf:
    """llama.cpp's implementation of the architecture (src/models/*.cpp and conversion/*.py of llama.cpp): "it" below.

    name: llama.cpp's name, empty if llmc cannot write the family. activations: the values of hidden_act that it computes.
    interleaved: it rotates neighbouring rows of Q and K; transformers rotates row i with row i + head_dim / 2.
    head: 'any': the file has no head if the embedding stands for it; 'own': the file always has a head; 'tied': it never has.
    biased: its linears always have biases, also where they are zero.
    rope: the types of rotary scaling that it supports. partial_rotary: it can rotate a part of each head.
    temperature: queries far into a text are scaled (llama_4_scaling_beta of the rotary parameters), and yarn reads mscale.
    local_theta: sliding layers may have another base of rotation.
    window: 'ignored': it has no sliding windows; 'key': it has none, but assumes one if the file lacks the key;
    'layers': some layers have one.
    window_depth: only models with this number of layers have windows; 0: all.
    unrotated: every such layer (4: the 4th, the 8th, ...) is without rotary positions, whatever the file says; 0: none.
    assumed: values of config.json that it assumes; a key that config.json lacks has the assumed value.
    values: {name in config.json: name of the value in the gguf package}, which it reads. required: those that it cannot lack.
    unattended: the kind in layer_types of layers without attention; empty: all have it.
    scalars: {tensor of a layer that holds one number: the name of its list in the gguf package}.
    wide_scale_layers: a model with this number of layers scales attention by hidden_size / heads, all others by head_dim.
    seventy_from: with at least this number of query heads for each key head, llama-quantize treats 80 layers as "70B" and
    uses another mix of types; 0: never.
    """

    name: str = ""
    activations: tuple[str, ...] = SILU
    interleaved: bool = False
    head: str = "any"
    biased: bool = False
    rope: tuple[str, ...] = ("linear", "yarn")
    partial_rotary: bool = False
    temperature: bool = False
    local_theta: bool = False
    window: str = "ignored"
    window_depth: int = 0
    unrotated: int = 0
    assumed: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[str, str] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    unattended: str = ""
    scalars: Mapping[str, str] = field(default_factory=dict)
    wide_scale_layers: int = 0
    seventy_from: int = 0


@dataclass(frozen=True)
class Family:
    """One family. Module names are names in a decoder layer, except final_norm.

    model_type: of config.json (of its text part). architecture: the class in transformers.
    linears: the linear of each role (`names.ROLES`). Fused: only `attn_qkv`; only `ffn_up`, with the gate's rows first.
    attention_norm, mlp_norm: only the first linears of attention and MLP read their outputs. Empty if there is none. They are
    the same if attention and MLP read one norm, side by side.
    post_norms: norms of the outputs of attention and MLP. head_norms: norms of single query and key heads.
    final_norm: the norm before the head; its name in the base model.
    offset: the number that norms add to their weight. centred: norms subtract the mean (LayerNorm).
    gated: the MLP has a gate, and the activation is applied to the gate only.
    qkv_by_head: `attn_qkv` has the query heads of key head 0, its k, its v, then those of key head 1, and so on; else all of
    q, all of k, all of v.
    grouped: query heads share num_key_value_heads key and value heads. rotary: positions are rotary embeddings.
    transposed: float weights of linears are stored as [in, out] (Conv1D).
    scaled_embedding: the embedding is multiplied by the square root of the number of channels.
    experts: the module of a layer that holds router, experts and what runs beside them; mlp_norm is read there alone. Some
    layers may have a gated MLP in its place. Empty for a dense family.
    unmapped: what layers have that the other fields do not describe; empty if nothing. Then layers cannot be changed.
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
    experts: str = ""
    unmapped: str = ""
    gguf: Gguf = Gguf()

    def role_of(self, module: str) -> str | None:
        """The role of a module, from its full name; None if it is not a linear of a layer."""
        return next((role for role, linear in self.linears.items() if module.endswith(f".{linear}")), None)

    @property
    def norms(self) -> dict[str, tuple[str, ...]]:
        """{norm: the linears that read its output}. Nothing else reads it."""
        found: dict[str, tuple[str, ...]] = {}
        for norm, roles in ((self.attention_norm, _ATTENTION_INPUTS), (self.mlp_norm, _MLP_INPUTS)):
            if norm:
                found[norm] = (*found.get(norm, ()), *(self.linears[role] for role in roles if role in self.linears))
        return found

    def norms_of(self, modules: Container[str]) -> dict[str, tuple[str, ...]]:
        """`norms` of one layer, by the names of its modules: without a norm of its own, the MLP reads that of attention."""
        return self.norms if self.mlp_norm in modules else replace(self, mlp_norm=self.attention_norm).norms

    @property
    def all_norms(self) -> tuple[str, ...]:
        """Every norm of a layer, each once."""
        return (*self.norms, *self.post_norms, *self.head_norms)

    def key_heads(self, config: Any) -> int:
        """The number of key and value heads in a transformers config."""
        if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
            return 1  # Falcon
        found = (getattr(config, name, None) for name in ("num_key_value_heads", "num_kv_heads"))
        return int((self.grouped and next(filter(None, found), None)) or config.num_attention_heads)

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
        if self.unmapped:
            return self.unmapped
        if self.experts:
            return "its experts are matrices of their own"
        if self.centred:
            return "its LayerNorm subtracts the mean of all channels"
        return "" if self.gated else "its MLP has no gate"


def activation_of(config: Any) -> str:
    """The name of the MLP's activation in a transformers config; '' if it names none (the code has a fixed one)."""
    names = ("hidden_activation", "activation_function", "hidden_act", "activation")
    return str(next((found for name in names if (found := getattr(config, name, None))), ""))
