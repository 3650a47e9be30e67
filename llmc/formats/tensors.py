"""One weight of an artifact."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Tensor:
    """A stored tensor, or the tensors of a quantized linear taken together."""

    name: str
    kind: str
    """Its class: one of llmc.families.names.CLASSES."""
    type: str
    """'F32', 'BF16', 'Q4_0', 'GPTQ int4', …; llmc's blocks have their GGUF type's name."""
    parameters: int
    nbytes: int
    used: float = 1.0
    """The share of it that decoding a token reads (see llmc.formats.experts). The token embedding has 1."""
    axes: int = 1
    """Of its shape, without axes of length 1. A matrix has two or more."""

    @property
    def token_bytes(self) -> int:
        return round(self.nbytes * self.used)

    @property
    def token_parameters(self) -> int:
        return round(self.parameters * self.used)

    @property
    def in_decoder(self) -> bool:
        """Whether it is part of attention or MLP, or another matrix of a decoder layer (state spaces, experts, routers)."""
        return self.kind in ("attention", "mlp") or (self.kind == "other" and self.axes > 1
                                                     and re.search(r"(?:^|\.)\d+\.", self.name) is not None)
