"""llama.cpp's mixes: the GGUF type that `llama-quantize` gives each tensor in a file type such as Q4_K_M.

Source: src/llama-quant.cpp of llama.cpp (build 1, commit 0c1e570, the version in llama-cpp-python 0.3.36):
`llama_ftype_get_default_type`, `llama_tensor_get_type_impl`, `tensor_type_fallback`. Left out: file types whose tensor types
llmc does not have (Q1_0, Q2_0), MXFP4_MOE, which is for experts alone, and the rules for Falcon.

benchmarks/presets_of_llama_cpp.py compares this table with a llama-quantize binary, tensor by tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmc.families import by_model_type
from llmc.formats.types import BLOCK_TYPES

# the type of every tensor that has no rule below
PRESETS = {
    "q2_k": "q2_k", "q2_k_s": "q2_k", "q3_k_s": "q3_k", "q3_k_m": "q3_k", "q3_k_l": "q3_k", "q4_0": "q4_0", "q4_1": "q4_1",
    "q4_k_s": "q4_k", "q4_k_m": "q4_k", "q5_0": "q5_0", "q5_1": "q5_1", "q5_k_s": "q5_k", "q5_k_m": "q5_k", "q6_k": "q6_k",
    "q8_0": "q8_0", "iq4_nl": "iq4_nl", "iq4_xs": "iq4_xs", "iq3_m": "iq3_s", "iq3_s": "iq3_s", "iq3_xs": "iq3_s",
    "iq3_xxs": "iq3_xxs", "iq2_m": "iq2_s", "iq2_s": "iq2_xs", "iq2_xs": "iq2_xs", "iq2_xxs": "iq2_xxs", "iq1_m": "iq1_m",
    "iq1_s": "iq1_s", "tq2_0": "tq2_0", "tq1_0": "tq1_0",
}
# the presets with a rule for each role that differs from those of the others
SMALL = ("iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s")
# what they give a tensor that gets more than their plain type
MORE = {"iq2_m": "iq3_s", "iq2_s": "iq3_s", "iq2_xs": "q2_k", "iq2_xxs": "q2_k", "iq1_m": "q2_k", "iq1_s": "q2_k"}
# the embedding's type, if it is not the plain one
EMBEDDING = {**MORE, "iq3_xxs": "iq3_s", "tq2_0": "q4_k", "tq1_0": "q4_k"}
# the type of rows that 256 does not divide
FALLBACK = {**{name: "iq4_nl" for name, qtype in BLOCK_TYPES.items() if qtype.codebook or name == "iq4_xs"},
            **dict.fromkeys(("q2_k", "q3_k", "tq1_0", "tq2_0"), "q4_0"), "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}


@dataclass(frozen=True)
class Facts:
    """The facts about a model that the rules use.

    layers: number of decoder layers.  gqa: query heads for each key head.  experts: 1 if the model has none.  imatrix:
    llama-quantize has an importance matrix.  seventy: llama.cpp treats the model as LLM_TYPE_70B.
    """

    layers: int
    gqa: int = 1
    experts: int = 1
    imatrix: bool = False
    seventy: bool = False

    @classmethod
    def of(cls, config: Any, imatrix: bool) -> Facts:
        """The facts of a transformers config."""
        text = config.get_text_config()
        heads = int(text.num_attention_heads)
        gqa = heads // int(getattr(text, "num_key_value_heads", None) or heads)
        experts = int(getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None) or 1)
        layers, family = int(text.num_hidden_layers), by_model_type(text.model_type)
        seventy = layers == 80 and family is not None and 0 < family.gguf.seventy_from <= gqa
        return cls(layers, gqa, experts, imatrix, seventy)

    def more_bits(self, layer: int) -> bool:
        """`use_more_bits`: true for the first and the last eighth of the layers, and for every third layer between."""
        eighth = self.layers // 8
        return layer < eighth or layer >= 7 * self.layers // 8 or (layer - eighth) % 3 == 2


def linear_type(preset: str, role: str, layer: int, facts: Facts, width: int) -> str:
    """The type of a linear of decoder layer `layer` (from 0) with rows of `width` weights."""
    rule = {"attn_v": _values, "attn_qkv": _values, "attn_q": _queries, "attn_k": _keys, "attn_output": _output,
            "ffn_down": _down, "ffn_gate": _up, "ffn_up": _up}.get(role)
    return fitting((rule(preset, layer, facts) if rule else None) or PRESETS[preset], width)


def end_type(preset: str, head: bool, width: int) -> str:
    """The type of embedding or head, with rows of `width` weights. head: it is the head, or an embedding tied to it."""
    plain = PRESETS[preset]
    if not head:
        return fitting(EMBEDDING.get(preset, plain), width)
    larger = "q5_k" if preset in SMALL or preset == "iq3_xxs" else "q6_k"
    return "q8_0" if plain == "q8_0" or width % BLOCK_TYPES[plain].block else fitting(larger, width)


def fitting(qtype: str, width: int) -> str:
    """`tensor_type_fallback`: the type, or its fallback if its blocks do not divide rows of `width` weights."""
    return FALLBACK.get(qtype, qtype) if width % BLOCK_TYPES[qtype].block else qtype


# One rule for each role. None means the preset's plain type.


def _values(preset: str, layer: int, facts: Facts) -> str | None:
    shared = facts.gqa >= 4
    if preset in SMALL:
        return "q4_k" if shared or facts.experts >= 4 else MORE[preset]
    if facts.experts == 8:
        return "q8_0"
    found = {
        "q2_k": "q4_k" if shared else "q3_k",
        "q2_k_s": "q4_k" if shared else None,
        "q3_k_m": "q5_k" if layer < 2 else "q4_k",
        "q3_k_l": "q5_k",
        "q4_k_s": "q5_k" if layer < 4 else None,
        "q4_k_m": "q6_k" if facts.more_bits(layer) else None,
        "q5_k_m": "q6_k" if facts.more_bits(layer) else None,
        "iq4_nl": "q5_k" if shared else None,
        "iq4_xs": "q5_k" if shared else None,
        "iq3_m": "q4_k",
        "iq3_s": "q4_k" if shared else None,
        "iq3_xs": "q4_k" if shared else None,
        "iq3_xxs": "q4_k" if shared else None if facts.imatrix else "iq3_s",
    }.get(preset) or PRESETS[preset]
    return "q5_k" if facts.seventy and found in ("q3_k", "q4_k") else found


def _queries(preset: str, layer: int, facts: Facts) -> str | None:
    return {"iq3_xs": "iq3_xxs", "iq3_xxs": "iq2_s"}.get(preset)


def _keys(preset: str, layer: int, facts: Facts) -> str | None:
    if facts.experts == 8:
        return "q4_k" if preset in SMALL else "q8_0"
    return _queries(preset, layer, facts)


def _output(preset: str, layer: int, facts: Facts) -> str | None:
    if facts.experts == 8:
        raised = ("q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m", "iq4_nl", "iq4_xs", "iq3_m", "iq3_s", "iq3_xs", "iq3_xxs",
                  *SMALL)
        return "q5_k" if preset in raised else None
    return {"q2_k": "q3_k", "q3_k_m": "q4_k", "q3_k_l": "q5_k", "iq3_m": "q4_k", "iq3_xxs": "iq3_s", "iq2_m": "iq3_s",
            "iq2_s": "iq3_s", "iq1_m": "iq2_xxs", "iq1_s": "iq2_xxs"}.get(preset)


def _down(preset: str, layer: int, facts: Facts) -> str | None:
    early = layer < facts.layers // 8
    if preset in SMALL:
        return MORE[preset] if early else None
    return {
        "q2_k": "q3_k",
        "q2_k_s": "q4_k" if early else None,
        "q3_k_m": "q5_k" if layer < facts.layers // 16 else "q4_k",
        "q3_k_l": "q5_k",
        "q4_0": "q4_1" if early and facts.imatrix else None,
        "q4_k_s": "q5_k" if early else None,
        "q4_k_m": "q6_k" if facts.more_bits(layer) else None,
        "q5_0": "q5_1" if early and facts.imatrix else None,
        "q5_k_m": "q6_k" if facts.more_bits(layer) else None,
        "iq4_nl": "q5_k" if early and not facts.imatrix else None,
        "iq4_xs": "q5_k" if early and not facts.imatrix else None,
        "iq3_m": "q4_k" if early or (facts.experts == 8 and facts.more_bits(layer)) else None,
        "iq3_xxs": None if facts.imatrix else "q4_k" if early else "q3_k",
    }.get(preset)


def _up(preset: str, layer: int, facts: Facts) -> str | None:
    """Of gate and up: the layers between the first and the last eighth get less."""
    between = facts.layers // 8 <= layer < 7 * facts.layers // 8
    return "iq3_xxs" if preset == "iq3_xs" and between else None
