"""The architectures that llmc writes into GGUF by itself: what llama.cpp must be told, what it expects of the weights.

Names of tensors come from the gguf package's own table. Where a model asks for something that llama.cpp's code for the
architecture does not do, that is an error here, or a note on the report where only long texts differ.
Source: src/models/*.cpp and conversion/*.py of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from llmc.errors import UserError
from llmc.export.gguf.rope import add_rope

if TYPE_CHECKING:
    from gguf import GGUFWriter

GELU_TANH = ("gelu_new", "gelu_pytorch_tanh")
CONVERTER = "use --converter PATH_TO_A_LLAMA.CPP_CHECKOUT: its own converter knows many more"


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    name: llama.cpp's.  activations: values of hidden_act that its code computes.
    interleaved: it rotates neighbouring rows of Q and K, where transformers rotates row i with i + head_dim / 2.
    one_plus_norm: transformers multiplies by 1 + weight in a norm, llama.cpp by the weight.
    transposed: modules whose float weight is stored [in, out].
    details: writes what only this architecture has, returns notes for the report.
    """

    name: str
    activations: tuple[str, ...]
    details: Callable[[GGUFWriter, Any], list[str]]
    interleaved: bool = False
    one_plus_norm: bool = False
    transposed: tuple[str, ...] = ()
    rotary: bool = True
    own_head: bool = True


def _unlike(name: str, value: Any, allowed: Any) -> UserError:
    return UserError(f"config.json has {name} = {value!r}, and llama.cpp computes {allowed!r} for this architecture",
                     "such a model cannot be run by llama.cpp as it is")


def _sliding_note(c: Any, uses: bool = True) -> list[str]:
    window = getattr(c, "sliding_window", None)
    if not uses or not window or window >= c.max_position_embeddings:
        return []
    return [f"llama.cpp runs this architecture with full attention; the model's sliding window of {window} tokens "
            "is not applied, so texts longer than that are computed differently"]


def _llama(writer: GGUFWriter, c: Any) -> list[str]:
    return _sliding_note(c)


def _qwen(writer: GGUFWriter, c: Any) -> list[str]:
    return _sliding_note(c, bool(getattr(c, "use_sliding_window", False)))


def _phi3(writer: GGUFWriter, c: Any) -> list[str]:
    # 0 tells llama.cpp that there is no window; without the key older versions assume Phi-3-mini's
    writer.add_sliding_window(c.sliding_window or 0)
    return _sliding_note(c)


def _gemma(writer: GGUFWriter, c: Any) -> None:
    """What Gemma 2 and 3 share: windows on some layers, and an attention scale that llama.cpp derives by itself."""
    heads = c.hidden_size // c.num_attention_heads
    large = c.num_hidden_layers == {"gemma2": 46, "gemma3": 62}[writer.arch]
    scale = heads if large else c.head_dim
    if c.query_pre_attn_scalar != scale:
        raise _unlike("query_pre_attn_scalar", c.query_pre_attn_scalar, scale)
    sliding = [kind == "sliding_attention" for kind in c.layer_types]
    if any(sliding):
        writer.add_sliding_window(c.sliding_window)
        writer.add_array(f"{writer.arch}.attention.sliding_window_pattern", sliding)


def _gemma2(writer: GGUFWriter, c: Any) -> list[str]:
    _gemma(writer, c)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if not getattr(c, name):
            raise _unlike(name, getattr(c, name), "a positive number")
    writer.add_attn_logit_softcapping(c.attn_logit_softcapping)
    writer.add_final_logit_softcapping(c.final_logit_softcapping)
    return []


def _gemma3(writer: GGUFWriter, c: Any) -> list[str]:
    _gemma(writer, c)
    if c.attn_logit_softcapping:
        raise _unlike("attn_logit_softcapping", c.attn_logit_softcapping, None)
    if getattr(c, "use_bidirectional_attention", False):
        raise _unlike("use_bidirectional_attention", True, False)
    if c.final_logit_softcapping:
        writer.add_final_logit_softcapping(c.final_logit_softcapping)
    return []


def _gpt2(writer: GGUFWriter, c: Any) -> list[str]:
    for name, needed in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        if getattr(c, name, needed) != needed:
            raise _unlike(name, getattr(c, name), needed)
    return []


SILU = ("silu", "swish")
KNOWN: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture("llama", SILU, _llama, interleaved=True),
    "MistralForCausalLM": Architecture("llama", SILU, _llama, interleaved=True),
    "Qwen2ForCausalLM": Architecture("qwen2", SILU, _qwen),
    "Qwen3ForCausalLM": Architecture("qwen3", SILU, _qwen),
    "Gemma2ForCausalLM": Architecture("gemma2", GELU_TANH, _gemma2, one_plus_norm=True, own_head=False),
    "Gemma3ForCausalLM": Architecture("gemma3", GELU_TANH, _gemma3, one_plus_norm=True),
    "Phi3ForCausalLM": Architecture("phi3", SILU, _phi3),
    "GPT2LMHeadModel": Architecture("gpt2", GELU_TANH, _gpt2, transposed=("c_attn", "c_proj", "c_fc"), rotary=False),
}


class TensorNames:
    """llama.cpp's names of a checkpoint's tensors, by the gguf package's table."""

    def __init__(self, arch: Architecture, layers: int) -> None:
        from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

        self.table = get_tensor_name_map(next(k for k in MODEL_ARCH if MODEL_ARCH_NAMES[k] == arch.name), layers)

    def find(self, name: str) -> str | None:
        """None where llama.cpp has no place for it. GPT-2's own checkpoints leave out the prefix that transformers gives
        its tensors."""
        found = (self.table.get_name(n, try_suffixes=(".weight", ".bias")) for n in (name, f"transformer.{name}"))
        return next(filter(None, found), None)


def find_architecture(config: dict[str, Any], hint: str = CONVERTER) -> Architecture:
    """The row for a config.json, by its `architectures`. hint: what else the user can do where there is none."""
    names = config.get("architectures") or []
    for name in names:
        if name in KNOWN:
            return KNOWN[name]
    what = ", ".join(names) or config.get("model_type") or "unnamed"
    raise UserError(f"llmc does not write the architecture {what} into GGUF; it writes {', '.join(KNOWN)}", hint)


def add_hyperparameters(writer: GGUFWriter, arch: Architecture, c: Any) -> tuple[dict[str, np.ndarray], list[str]]:
    """Write what llama.cpp must know of the model.

    c: the transformers config, complete with defaults.  Returns the rope tensors and notes for the report.
    """
    activation = getattr(c, "hidden_activation", None) or getattr(c, "activation_function", None) or c.hidden_act
    if activation not in arch.activations:
        raise _unlike("the activation", activation, arch.activations[0])
    heads = c.num_attention_heads
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // heads
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    inner = getattr(c, "intermediate_size", None) or getattr(c, "n_inner", None) or 4 * c.hidden_size
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(c, "num_key_value_heads", None) or heads if arch.rotary else heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if hasattr(c, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(c.layer_norm_epsilon)
    tensors = add_rope(writer, c.to_dict(), head_dim, c.max_position_embeddings) if arch.rotary else {}
    return tensors, arch.details(writer, c)


def interleave(rows: int, heads: int) -> np.ndarray:
    """Order in which llama.cpp's llama wants the rows of Q or K: of each head 0, d/2, 1, d/2 + 1, …"""
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)
