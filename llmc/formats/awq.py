"""AWQ folders as AutoAWQ writes them (version "gemm"), 4 bits. A linear of weight [out, in] is stored as

    qweight int32   [in, out / 8]       codes; word w of a row holds the outputs 8 w + ORDER[i], i in bits 4 i … 4 i + 3
    qzeros  int32   [groups, out / 8]   zero points, in the same order, as they are
    scales  float16 [groups, out]

A weight is scale * (code - zero). Source: AutoAWQ 0.2, awq/modules/linear/gemm.py and awq/utils/packing_utils.py.
"""

from __future__ import annotations

import torch

from llmc.errors import UserError
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.integers import Integers
from llmc.formats.packed import parts_of
from llmc.formats.types import IntegerType

PARTS = parts_of("awq")
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def quantized_linears(ckpt: Checkpoint) -> list[str]:
    """Module names of the quantized linears, in file order. Raises UserError for a config that llmc cannot read."""
    _group_size(ckpt)
    return [n.removesuffix(".qweight") for n in ckpt.names() if n.endswith(".qweight")]


def _group_size(ckpt: Checkpoint) -> int:
    """Of the config; -1 is a whole row. Older files call it q_group_size, and bits w_bit."""
    c = ckpt.quantization or {}
    bits, size = c.get("bits", c.get("w_bit")), c.get("group_size", c.get("q_group_size"))
    if bits != 4 or type(size) is not int or not (size == -1 or size > 0):
        raise UserError(f"{ckpt.folder} is AWQ with {bits!r} bits and group_size {size!r}; llmc reads 4 bits with a group "
                        "size of -1 or more than 0", "start from the float model")
    return size


def shape(ckpt: Checkpoint, linear: str) -> tuple[int, int]:
    """[out, in] of a linear, from the header of its codes."""
    width, words = ckpt.shape(f"{linear}.qweight")
    return words * 8, width


def type_of(ckpt: Checkpoint, linear: str) -> IntegerType:
    """The type of a linear. Every AWQ linear stores its zero points."""
    size = _group_size(ckpt)
    return IntegerType(4, size if size > 0 else shape(ckpt, linear)[1], False)


def scales_name(linear: str) -> str:
    """The tensor of its scales."""
    return f"{linear}.scales"


def order(ckpt: Checkpoint, linear: str) -> None:
    """AWQ keeps the columns in their order."""


def read(ckpt: Checkpoint, linear: str) -> Integers:
    """One linear, codes [out, in]. Raises UserError if tensors are missing or do not fit each other."""
    if missing := [part for part in PARTS if f"{linear}.{part}" not in ckpt]:
        raise UserError(f"{linear}.{' and '.join(missing)} is missing from {ckpt.folder}", "make or download it again")
    qtype, (out, width) = type_of(ckpt, linear), shape(ckpt, linear)
    groups = width // qtype.group_size
    scales, zeros = ckpt.tensor(f"{linear}.scales"), ckpt.tensor(f"{linear}.qzeros")
    if width % qtype.group_size or scales.shape != (groups, out) or zeros.shape != (groups, out // 8):
        raise UserError(f"{linear} of {ckpt.folder} has scales {list(scales.shape)} and qzeros {list(zeros.shape)}, and "
                        f"{width} columns in groups of {qtype.group_size} need {groups} rows of {out} and {out // 8}",
                        "the group_size in its config is wrong, or the folder is damaged: download it again")
    return Integers(qtype, unpack(ckpt.tensor(f"{linear}.qweight")).t().contiguous(), scales.t().contiguous(),
                    unpack(zeros).t().contiguous())


def unpack(words: torch.Tensor) -> torch.Tensor:
    """int32 [n, m] -> uint8 [n, 8 * m], in the order of the outputs."""
    found = torch.empty(*words.shape, 8, dtype=torch.uint8)
    for i, place in enumerate(ORDER):
        found[..., place] = ((words >> 4 * i) & 15).to(torch.uint8)
    return found.flatten(1)
