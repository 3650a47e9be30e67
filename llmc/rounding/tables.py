"""Rounding of a float matrix at the export: an embedding, a head, or any matrix that no pass quantized.

Both formats round here, so a table of one type has the same codes in a .gguf file and in an ONNX folder.
"""

from __future__ import annotations

import torch

from llmc.formats.types import BLOCK_TYPES, BlockTensor
from llmc.rounding.q6_k import round_q6_k
from llmc.rounding.rtn import rtn

CHUNK = 1 << 22  # weights rounded at once: bounds the temporaries to a few tens of megabytes
LARGEST = torch.finfo(torch.float16).max  # of a stored scale


def round_rows(w: torch.Tensor, type_name: str) -> BlockTensor:
    """Round float [rows, n] to a GGUF block type; n must be a multiple of its block.

    Q8_0 has the scale max |w| / 127, as llama.cpp. The other types have the scale with the smallest error (see `rtn` and
    `round_q6_k`). Raises ValueError if a weight is not finite, or too large for a float16 scale.
    """
    x, qtype = w.to(torch.float32).contiguous(), BLOCK_TYPES[type_name]
    # with a minimum, which is stored as it is, the levels reach no further than the minimum does
    levels = 1 if qtype.has_min else min(127, max(map(abs, qtype.levels))) * qtype.unit
    if not bool((x.abs() <= LARGEST * levels * max(map(abs, qtype.scale_range or (1,)))).all()):  # false for NaN
        raise ValueError(f"weights that are not finite, or too large for the scales of {type_name}")
    if type_name == "q8_0":
        return _q8_0(x)
    if type_name == "q6_k":
        return round_q6_k(x.numpy())
    q = rtn(x, qtype)
    assert isinstance(q, BlockTensor)
    return q


def round_table(w: torch.Tensor, type_name: str) -> BlockTensor:
    """`round_rows` of a whole matrix, a part at a time. The codes do not depend on the parts. For types of two factors or
    fewer without integer scales: Q4_0, Q4_1, Q8_0 and their like."""
    parts = [round_rows(part, type_name) for part in w.split(max(1, CHUNK // w.shape[1]))]
    assert parts[0].scales is None
    m = None if parts[0].m is None else torch.cat([p.m for p in parts if p.m is not None])
    return BlockTensor(parts[0].type, torch.cat([p.codes for p in parts]), torch.cat([p.d for p in parts]), m)


def _q8_0(x: torch.Tensor) -> BlockTensor:
    """Codes are rounded half away from zero with the scale in float32; the file stores it in float16."""
    groups = x.reshape(x.shape[0], -1, BLOCK_TYPES["q8_0"].block)
    d = groups.abs().amax(-1) / 127
    scaled = groups * torch.where(d == 0, torch.zeros_like(d), 1 / d).unsqueeze(-1)
    codes = torch.trunc(scaled + torch.copysign(torch.full_like(scaled, 0.5), scaled)) + 128
    return BlockTensor(BLOCK_TYPES["q8_0"], codes.to(torch.uint8).view(x.shape), d.to(torch.float16))
