"""A quantized model folder, with GPTQ tensors (gptq.py) or GGUF blocks (blocks.py)."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch

from llmc.errors import UserError
from llmc.formats import blocks, gptq
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.types import BLOCK_TYPES, BlockTensor, BlockType, IntegerType, QuantizedTensor

Quantized = QuantizedTensor | BlockTensor
METHODS = ("gptq", blocks.METHOD)  # what `quant_method` of config.json can be


def is_quantized(ckpt: Checkpoint) -> bool:
    """Whether the folder holds codes, also in a form that llmc cannot read."""
    return ckpt.quantization is not None


def linears(ckpt: Checkpoint) -> list[str]:
    """Module names of the quantized linears, in file order; empty for a float folder. Raises UserError for a form that
    llmc cannot read."""
    if _is_blocks(ckpt):
        return blocks.quantized_linears(ckpt)
    found = gptq.quantized_linears(ckpt)
    if found or is_quantized(ckpt):
        gptq.type_of(ckpt)
    return found


def end_types(ckpt: Checkpoint) -> dict[str, str]:
    """The types of embedding and lm_head that the folder asks the export for: {'embedding': …, 'head': …}. A key can be
    missing. UserError if a type is unknown."""
    found = (ckpt.quantization or {}).get("end_types", {})
    if not isinstance(found, dict) or not all(name in BLOCK_TYPES for name in found.values()):
        raise UserError(f"quantization_config of {ckpt.folder} has the end_types {found!r}; this llmc knows the types "
                        f"{', '.join(BLOCK_TYPES)}", "set the types with --embedding and --head, or use a newer llmc")
    return found


def parts(linear: str) -> tuple[str, ...]:
    """All possible tensor names of a quantized linear, without its bias."""
    return tuple(f"{linear}.{part}" for part in (*gptq.PARTS, *blocks.PARTS))


def type_of(ckpt: Checkpoint, linear: str) -> IntegerType | BlockType:
    """The type of one linear. If a GPTQ group is a whole row, group_size is the row's length."""
    if _is_blocks(ckpt):
        return blocks.type_of(ckpt, linear)
    declared = gptq.type_of(ckpt)
    return declared if declared.group_size > 0 else IntegerType(declared.bits, shape(ckpt, linear)[1], declared.symmetric)


def type_name(ckpt: Checkpoint, linear: str) -> str:
    """'int4-sym-g32', 'q4_k', …"""
    return type_of(ckpt, linear).name


def shape(ckpt: Checkpoint, linear: str) -> tuple[int, int]:
    """[out, in] of one linear, from headers only."""
    return blocks.shape(ckpt, linear) if _is_blocks(ckpt) else gptq.shape(ckpt, linear)


def read(ckpt: Checkpoint, linear: str) -> Quantized:
    """One linear, codes [out, in]."""
    return blocks.read(ckpt, linear) if _is_blocks(ckpt) else gptq.read(ckpt, linear, gptq.type_of(ckpt))


def dequantized(ckpt: Checkpoint, linear: str) -> torch.Tensor:
    """One linear, float32 [out, in]. Also for GPTQ's columns in another order, which `read` refuses."""
    return blocks.read(ckpt, linear).dequantize() if _is_blocks(ckpt) else gptq.dequantized(ckpt, linear, gptq.type_of(ckpt))


def check_order(ckpt: Checkpoint) -> None:
    """Raise UserError if `read` would refuse a linear because of the order of its columns. Reads g_idx only."""
    if not _is_blocks(ckpt) and is_quantized(ckpt):
        gptq.check_order(ckpt)


def encode(q: Quantized) -> dict[str, torch.Tensor]:
    """{last part of the name: tensor} of one linear, in the form of its type."""
    return blocks.encode(q) if isinstance(q, BlockTensor) else gptq.encode(q)


def as_blocks(q: Quantized) -> BlockTensor:
    """The same weights and codes as a BlockTensor, for an integer type that a GGUF type can hold. A group's scale is
    repeated for each of its blocks. Raises ValueError if float16 cannot hold a minimum exactly (see `minimums`)."""
    if isinstance(q, BlockTensor):
        return q
    repeats, m = q.type.group_size // 32, None
    if q.zeros is not None:
        m, wrong = minimums(q)
        if wrong:
            raise ValueError(f"float16 cannot hold {wrong} minimums exactly")
        m = m.repeat_interleave(repeats, 1)
    name = {(4, False): "q4_0", (8, False): "q8_0", (4, True): "q4_1"}[q.type.bits, q.zeros is not None]
    return BlockTensor(BLOCK_TYPES[name], q.codes, q.scales.repeat_interleave(repeats, 1), m)


def minimums(q: QuantizedTensor) -> tuple[torch.Tensor, int]:
    """Q4_1's m = -scale * zero of each group, float16 [out, groups], and the number that float16 cannot hold exactly."""
    assert q.zeros is not None
    exact = -q.scales.to(torch.float32) * q.zeros.to(torch.float32)  # 11 + 4 bits: exact here
    rounded = exact.to(torch.float16)
    return rounded, int((rounded.to(torch.float32) != exact).sum())


def tensors_of(q: Quantized) -> dict[str, torch.Tensor]:
    """{field: tensor} of codes, scales and the other tensors. The first axis of each is the rows of the matrix."""
    found = ((f.name, getattr(q, f.name)) for f in fields(q))
    return {name: value for name, value in found if isinstance(value, torch.Tensor)}


def with_tensors(q: Quantized, tensors: dict[str, Any]) -> Quantized:
    """A copy with other tensors. tensors: {field: tensor}, as from `tensors_of`."""
    return replace(q, **tensors)


def rows_of(q: Quantized, index: torch.Tensor | slice) -> Quantized:
    """The rows that `index` selects. Blocks and groups lie within a row, so they stay whole."""
    return with_tensors(q, {name: t[index] for name, t in tensors_of(q).items()})


def _is_blocks(ckpt: Checkpoint) -> bool:
    return (ckpt.quantization or {}).get("quant_method") == blocks.METHOD
