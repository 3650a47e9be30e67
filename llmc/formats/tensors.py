"""The weights of an artifact as a list, and the class of a weight by its name."""

from __future__ import annotations

import re
from dataclasses import dataclass

CLASSES = ("embedding", "head", "attention", "mlp", "other")
# First match wins; `other` is what is left: norms and what no rule knows. Hugging Face names, then GGUF names.
_RULES = (
    ("other", r"norm|\bln_|rope_freqs|rotary"),
    ("embedding", r"\bembed_tokens\b|\bembed_positions\b|\bembed_in\b|\bwte\b|\bwpe\b|token_embd|position_embd"),
    ("head", r"\blm_head\b|\bembed_out\b|^output\.|^output$"),
    ("attention", r"attn|attention"),
    ("mlp", r"\bmlp\b|\bffn|\bfc[12]\b|feed_forward|experts|moe"),
)


@dataclass(frozen=True)
class Tensor:
    """One weight: a stored tensor, or the tensors of a quantized linear taken together."""

    name: str
    kind: str
    """One of CLASSES."""
    type: str
    """'F32', 'BF16', 'Q4_0', 'GPTQ int4', …; llmc's blocks have their GGUF type's name."""
    parameters: int
    nbytes: int


def classify(name: str) -> str:
    """The class of a tensor by its name, in Hugging Face's or llama.cpp's spelling."""
    return next((kind for kind, pattern in _RULES if re.search(pattern, name)), "other")
