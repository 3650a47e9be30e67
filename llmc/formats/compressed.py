"""Folders of compressed-tensors with packed integers (format "pack-quantized"). A linear of weight [out, in] is stored as

    weight_packed      int32 [out, in * bits / 32]      codes along a row, the first in the lowest bits
    weight_scale       float [out, groups]              one group is a whole row (strategy "channel")
    weight_zero_point  int32 [out * bits / 32, groups]  packed along the rows; only of asymmetric types
    weight_shape       int64 [2]                        [out, in]
    weight_g_idx       int32 [in]                       the group of each column; only with actorder "group"

Codes and zero points are signed, and stored with 2^(bits - 1) added. A weight is scale * (code - zero). The tensors say all
of this, so groups of modules in the config are not read. Source: compressed-tensors 0.12, compressors/pack_quantized.
"""

from __future__ import annotations

import torch

from llmc.errors import UserError
from llmc.formats import integers
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.integers import Integers, unpack
from llmc.formats.packed import parts_of
from llmc.formats.types import IntegerType

PARTS = parts_of("compressed-tensors")
AGAIN = "the folder is damaged: make or download it again"


def quantized_linears(ckpt: Checkpoint) -> list[str]:
    """Module names of the quantized linears, in file order."""
    return [n.removesuffix(".weight_packed") for n in ckpt.names() if n.endswith(".weight_packed")]


def shape(ckpt: Checkpoint, linear: str) -> tuple[int, int]:
    """[out, in] of a linear."""
    if f"{linear}.weight_shape" not in ckpt:
        raise UserError(f"{linear}.weight_shape is missing from {ckpt.folder}", AGAIN)
    out, width = (int(n) for n in ckpt.tensor(f"{linear}.weight_shape").tolist())
    return out, width


def type_of(ckpt: Checkpoint, linear: str) -> IntegerType:
    """The type of a linear, from the shapes of its tensors. Raises UserError if they do not fit, or have other bits."""
    (out, width), packed = shape(ckpt, linear), ckpt.shape(f"{linear}.weight_packed")
    if f"{linear}.weight_scale" not in ckpt:
        raise UserError(f"{linear}.weight_scale is missing from {ckpt.folder}", AGAIN)
    scales = ckpt.shape(f"{linear}.weight_scale")
    bits, rest = divmod(packed[-1] * 32, width)
    if packed[:-1] != (out,) or len(scales) != 2 or scales[0] != out or width % scales[1]:
        raise UserError(f"{linear} of {ckpt.folder} has weight_packed {list(packed)} and weight_scale {list(scales)}, which "
                        f"do not fit its weight_shape, {[out, width]}", AGAIN)
    if bits not in (4, 8) or rest:
        raise UserError(f"{linear} of {ckpt.folder} has {packed[-1] * 32 / width:g} bits a weight; llmc reads 4 and 8",
                        "start from the float model")
    return IntegerType(bits, width // scales[1], f"{linear}.weight_zero_point" not in ckpt)


def scales_name(linear: str) -> str:
    """The tensor of its scales."""
    return f"{linear}.weight_scale"


def order(ckpt: Checkpoint, linear: str) -> torch.Tensor | None:
    """int64 [in], the group of each column. None if column i is in group i // group_size."""
    if f"{linear}.weight_g_idx" not in ckpt:
        return None
    return integers.order(ckpt, f"{linear}.weight_g_idx", type_of(ckpt, linear), shape(ckpt, linear)[1])


def read(ckpt: Checkpoint, linear: str) -> Integers:
    """One linear, codes [out, in]. Raises UserError if its tensors do not fit each other."""
    qtype, (out, _) = type_of(ckpt, linear), shape(ckpt, linear)
    codes, scales = ckpt.tensor(f"{linear}.weight_packed"), ckpt.tensor(f"{linear}.weight_scale")
    zeros = None
    if not qtype.symmetric:
        zeros = unpack(ckpt.tensor(f"{linear}.weight_zero_point"), qtype.bits)[:out]
        if zeros.shape != scales.shape:
            raise UserError(f"{linear} of {ckpt.folder} has zero points {list(zeros.shape)} and scales {list(scales.shape)}",
                            AGAIN)
    return Integers(qtype, unpack(codes.t().contiguous(), qtype.bits).t().contiguous(), scales, zeros)
