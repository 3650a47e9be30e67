"""Rotary embeddings: transformers' parameters as llama.cpp's metadata and tensors.

Both forms are read: `rope_parameters` (transformers 5; Gemma 3 nests one dict for each layer type) and `rope_scaling` beside
`rope_theta` (transformers 4). Sources: transformers/modeling_rope_utils.py; src/llama-context.cpp and ggml_rope_ext of
llama.cpp. A variant that llama.cpp does not support is an error: if it were ignored, long texts would be silently wrong.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from llmc.errors import UserError
from llmc.families import by_gguf

if TYPE_CHECKING:
    from gguf import GGUFWriter

ADVICE = "llama.cpp's converter may support the model: give the folder that `llmc setup converter` prints with --converter"


@dataclass(frozen=True)
class RopeParameters:
    """kind: 'default', 'linear', 'yarn', 'llama3', 'longrope' or 'ntk_alpha'. local_theta: the base of sliding layers, if it
    is given apart."""

    kind: str
    theta: float
    values: dict[str, Any]
    local_theta: float | None = None


def rope_parameters(config: dict[str, Any]) -> RopeParameters:
    """Read the rotary parameters of a config.json, raw or completed by transformers, in either form."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    local: dict[str, Any] = {}
    if isinstance(found.get("full_attention"), dict):
        local = found.get("sliding_attention") or {}
        found = found["full_attention"]
    elif config.get("rope_local_base_freq") is not None:
        local = {"rope_theta": config["rope_local_base_freq"]}
    if (kind := _kind(local)) != "default":
        raise UserError(f"the sliding layers use rope type {kind!r}, which GGUF cannot store", ADVICE)
    values = {k: v for k, v in found.items() if v is not None}
    for name in ("partial_rotary_factor", "rotary_pct"):  # transformers 4
        if config.get(name) is not None:
            values.setdefault("partial_rotary_factor", config[name])
    if config.get("original_max_position_embeddings") is not None:  # Phi-3 uses the value outside of rope_scaling
        values["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    theta = float(values.get("rope_theta") or config.get("rope_theta") or 10000.0)
    if "mrope_section" in values:
        raise UserError("this model uses mrope (rotation by sections), as multimodal architectures do", ADVICE)
    return RopeParameters(_kind(found), theta, values, float(local["rope_theta"]) if "rope_theta" in local else None)


def _kind(values: dict[str, Any]) -> str:
    kind = str(values.get("rope_type") or values.get("type") or "default")
    if kind == "dynamic" and values.get("alpha"):
        return "ntk_alpha"  # HunYuan's: not dynamic at all
    return "longrope" if kind == "su" else kind


def add_rope(writer: GGUFWriter, config: dict[str, Any], head_dim: int, context: int) -> dict[str, np.ndarray]:
    """Write the metadata; return the extra tensors (float32 [dims / 2]) by name.

    context: max_position_embeddings.
    """
    from gguf import RopeScalingType

    rope, family = rope_parameters(config), by_gguf(writer.arch)
    assert family is not None  # metadata is only written for architectures of the family table
    dims = int(head_dim * float(rope.values.get("partial_rotary_factor", 1.0)))
    if dims != head_dim and not family.gguf.partial_rotary:
        raise UserError(f"only {dims} of {head_dim} dimensions of a head are rotated, and llama.cpp's {writer.arch} "
                        "architecture rotates all", ADVICE)
    writer.add_rope_dimension_count(dims)
    scale = float(rope.values["alpha"]) ** (dims / (dims - 2)) if rope.kind == "ntk_alpha" else 1.0
    writer.add_rope_freq_base(rope.theta * scale)
    if rope.local_theta is not None and family.gguf.local_theta:
        writer.add_rope_freq_base_swa(rope.local_theta)
    elif rope.local_theta not in (None, rope.theta):
        raise UserError(f"rope_theta is {rope.local_theta:g} in sliding layers and {rope.theta:g} in the others, and "
                        f"llama.cpp's {writer.arch} architecture has one for both", ADVICE)
    if rope.kind not in ("default", *family.gguf.rope):
        raise UserError(f"llama.cpp's {writer.arch} architecture does not support the rope type {rope.kind!r}", ADVICE)
    if (temperature := rope.values.get("llama_4_scaling_beta")) is not None:
        if not family.gguf.temperature or rope.kind != "yarn":
            raise UserError(f"queries are scaled by llama_4_scaling_beta, and llama.cpp's {writer.arch} architecture does "
                            f"not do that with the rope type {rope.kind!r}", ADVICE)
        writer.add_attn_temperature_scale(float(temperature))
    if rope.kind in ("default", "ntk_alpha"):
        return {}
    if rope.kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope.values["factor"]))
        return {}
    if rope.kind == "yarn":
        _add_yarn(writer, rope.values, context)
        return {}
    if rope.kind == "llama3":
        return {"rope_freqs.weight": _llama3_factors(rope, dims, context)}
    return _add_longrope(writer, rope.values, dims, context)


def yarn_note(config: dict[str, Any]) -> str | None:
    """What llama.cpp computes in another way if config.json says `truncate: false`: it rounds the ends of YaRN's ramp to
    whole dimensions. None if that changes nothing. config: as for rope_parameters."""
    for v in _parameters(config):
        theta = float(v.get("rope_theta") or config.get("rope_theta") or 10000.0)
        if _kind(v) != "yarn" or v.get("truncate", True) or theta <= 1:
            continue
        heads, width = config.get("num_attention_heads") or 1, config.get("hidden_size") or 0
        dims = int((config.get("head_dim") or width // heads) * float(v.get("partial_rotary_factor") or 1.0))
        original = int(v.get("original_max_position_embeddings") or config.get("max_position_embeddings") or 0)
        ends = [dims * math.log(original / (float(v.get(key) or turns) * 2 * math.pi)) / (2 * math.log(theta))
                for key, turns in (("beta_fast", 32), ("beta_slow", 1))]
        if not all(math.isclose(end, round(end), abs_tol=1e-6) for end in ends):
            return (f"config.json has truncate = false: YaRN's ramp goes from dimension {ends[0]:.2f} to {ends[1]:.2f} of "
                    f"{dims // 2}, and llama.cpp computes {math.floor(ends[0])} to {math.ceil(ends[1])}. The file is "
                    "compared with the model as llama.cpp computes it; `llmc eval` measures the difference too")
    return None


def as_computed(config: Any) -> Any:
    """The transformers config of the model that llama.cpp computes: the ends of YaRN's ramp are whole dimensions."""
    changed = copy.deepcopy(config)
    for part in {id(c): c for c in (changed, changed.get_text_config())}.values():
        for name in ("rope_parameters", "rope_scaling"):
            for v in _parameters({name: getattr(part, name, None)}):
                if _kind(v) == "yarn" and "truncate" in v:
                    v["truncate"] = True
    return changed


def _parameters(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The rope parameters of a config: one set, and those of each kind of layer."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return [found, *(v for v in found.values() if isinstance(v, dict))]


def _add_yarn(writer: GGUFWriter, v: dict[str, Any], context: int) -> None:
    from gguf import RopeScalingType

    for key, only in (("beta_fast", 32), ("beta_slow", 1)):
        if v.get(key, only) != only:
            raise UserError(f"yarn with {key} = {v[key]}: llama.cpp's {writer.arch} architecture supports only {only}",
                            ADVICE)
    original = int(v.get("original_max_position_embeddings") or context)
    factor = float(v.get("factor") or context / original)
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(factor)
    writer.add_rope_scaling_orig_ctx_len(original)

    def growth(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention = v.get("attention_factor")
    if attention is None:
        m, all_dims = v.get("mscale"), v.get("mscale_all_dim")
        attention = growth(m) / growth(all_dims) if m and all_dims else growth(1.0)
    # llama.cpp itself multiplies by growth(1)
    if not math.isclose(attention, growth(1.0), rel_tol=1e-6):
        writer.add_rope_scaling_attn_factors(float(attention) / growth(1.0))


def _llama3_factors(rope: RopeParameters, dims: int, context: int) -> np.ndarray:
    """Divisors of the frequencies (Llama 3.1): 1 for short waves, `factor` for long waves, a blend in between."""
    v = rope.values
    factor, low, high = float(v["factor"]), float(v["low_freq_factor"]), float(v["high_freq_factor"])
    turns = int(v.get("original_max_position_embeddings") or context)
    turns_of = turns * rope.theta ** -(np.arange(0, dims, 2, dtype=np.float64) / dims) / (2 * math.pi)
    smooth = np.clip((turns_of - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / factor + smooth)).astype(np.float32)


def _add_longrope(writer: GGUFWriter, v: dict[str, Any], dims: int, context: int) -> dict[str, np.ndarray]:
    from gguf import RopeScalingType

    original = int(v.get("original_max_position_embeddings") or context)
    factor = float(v.get("factor") or context / original)
    attention = v.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    writer.add_rope_scaling_type(RopeScalingType.LONGROPE)
    writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_rope_scaling_attn_factors(float(attention))
    tensors = {}
    for name in ("long", "short"):
        factors = np.asarray(v[f"{name}_factor"], dtype=np.float32)
        if factors.shape != (dims // 2,):
            raise UserError(f"longrope's {name}_factor has {factors.size} values for {dims // 2} frequencies",
                            "correct rope_scaling in config.json")
        tensors[f"rope_factors_{name}.weight"] = factors
    return tensors
