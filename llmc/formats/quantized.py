"""A quantized model folder: linears as integers of GPTQ, AWQ or compressed-tensors, or as GGUF blocks (blocks.py)."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import torch

from llmc.errors import UserError
from llmc.formats import awq, blocks, compressed, gptq, integers
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.packed import LAYOUTS, layout_of, refused
from llmc.formats.types import BLOCK_TYPES, BlockTensor, BlockType, IntegerType, QuantizedTensor

Quantized = QuantizedTensor | BlockTensor
OWN = ("gptq", blocks.METHOD)  # the forms that llmc writes
_INTEGERS = {"gptq": gptq, "awq": awq, "compressed-tensors": compressed}  # by Layout.codes


def is_quantized(ckpt: Checkpoint) -> bool:
    """Whether the folder holds codes, also in a form that llmc cannot read."""
    return ckpt.quantization is not None


def form_of(ckpt: Checkpoint) -> str | None:
    """How the codes are stored: 'gptq', 'awq', 'compressed-tensors' or 'llmc-blocks'; None if llmc cannot read them."""
    return layout_of(ckpt.quantization).codes


def linears(ckpt: Checkpoint) -> list[str]:
    """Module names of the quantized linears, in file order; empty for a float folder. Raises UserError for a form that
    llmc cannot read."""
    if not is_quantized(ckpt):
        return []
    if form_of(ckpt) is None:
        raise refused(ckpt.folder, ckpt.quantization)
    return blocks.quantized_linears(ckpt) if _is_blocks(ckpt) else _module(ckpt).quantized_linears(ckpt)


def end_types(ckpt: Checkpoint) -> dict[str, str]:
    """The types of embedding and lm_head that the folder asks the export for: {'embedding': …, 'head': …}. A key can be
    missing. UserError if a type is unknown."""
    found = (ckpt.quantization or {}).get("end_types", {})
    if not isinstance(found, dict) or not all(name in BLOCK_TYPES for name in found.values()):
        raise UserError(f"quantization_config of {ckpt.folder} has the end_types {found!r}; this llmc knows the types "
                        f"{', '.join(BLOCK_TYPES)}", "set the types with --embedding and --head, or use a newer llmc")
    return found


def bits_per_weight(ckpt: Checkpoint) -> float:
    """Bits per weight of the quantized linears of a folder, their factors included."""
    sizes = [(math.prod(shape(ckpt, linear)), type_of(ckpt, linear).bits_per_weight) for linear in linears(ckpt)]
    return sum(n * bits for n, bits in sizes) / sum(n for n, _ in sizes)


def ends_beside(bits: float, width: int) -> tuple[str, str]:
    """The block types of (the head, an embedding that is a matrix of its own), with rows of `width` weights, beside a decoder
    of so many bits per weight. An embedding that is the head too has the head's type.

    Rounding a head costs five to ten times as much as rounding an embedding (benchmarks/ends.py). So the head has 6 bits, and
    the embedding about as many as the decoder."""
    def first(names: tuple[str, ...]) -> str:
        types = [BLOCK_TYPES[n] for n in names]
        return next((t.name for t in types if width % t.block == 0 and t.bits_per_weight >= bits), "q8_0")

    return first(("q6_k",)), first(("q4_k", "iq4_nl", "q5_k", "q5_0", "q6_k"))


def parts(linear: str) -> tuple[str, ...]:
    """All possible tensor names of a quantized linear, without its bias."""
    return tuple(dict.fromkeys(f"{linear}.{part}" for layout in LAYOUTS for part in layout.parts))


def type_of(ckpt: Checkpoint, linear: str) -> IntegerType | BlockType:
    """The type of one linear. If a group of integers is a whole row, group_size is the row's length."""
    return blocks.type_of(ckpt, linear) if _is_blocks(ckpt) else _module(ckpt).type_of(ckpt, linear)


def type_name(ckpt: Checkpoint, linear: str) -> str:
    """'int4-sym-g32', 'q4_k', …"""
    return type_of(ckpt, linear).name


def shape(ckpt: Checkpoint, linear: str) -> tuple[int, int]:
    """[out, in] of one linear. Reads no codes."""
    return blocks.shape(ckpt, linear) if _is_blocks(ckpt) else _module(ckpt).shape(ckpt, linear)


def read(ckpt: Checkpoint, linear: str) -> Quantized:
    """One linear, codes [out, in]. Scales are rounded to float16 (`rounded_scales` counts them). Raises UserError if its
    columns are in another order (act-order), or if float16 cannot hold its scales."""
    if _is_blocks(ckpt):
        return blocks.read(ckpt, linear)
    if _module(ckpt).order(ckpt, linear) is not None:
        raise integers.permuted(ckpt, linear)
    found = _module(ckpt).read(ckpt, linear)
    _rounded(ckpt, linear, found.scales)
    return found.tensor()


def dequantized(ckpt: Checkpoint, linear: str) -> torch.Tensor:
    """One linear, float32 [out, in]. Also for columns in another order, which `read` refuses."""
    if _is_blocks(ckpt):
        return blocks.read(ckpt, linear).dequantize()
    return _module(ckpt).read(ckpt, linear).dequantize(_module(ckpt).order(ckpt, linear))


def check_order(ckpt: Checkpoint) -> None:
    """Raise UserError if `read` would refuse a linear because of the order of its columns. Reads g_idx only."""
    if is_quantized(ckpt) and not _is_blocks(ckpt):
        for linear in linears(ckpt):
            if _module(ckpt).order(ckpt, linear) is not None:
                raise integers.permuted(ckpt, linear)


def rounded_scales(ckpt: Checkpoint) -> list[str]:
    """The linears with scales that `read` rounds to float16, where GGUF and ONNX hold them. Reads scales only."""
    if not is_quantized(ckpt) or _is_blocks(ckpt):
        return []
    names = {linear: _module(ckpt).scales_name(linear) for linear in linears(ckpt)}
    return [linear for linear, name in names.items()
            if name in ckpt and ckpt.dtype(name) != "F16" and _rounded(ckpt, linear, ckpt.tensor(name))]


def notes_of_codes(ckpt: Checkpoint) -> list[str]:
    """What an export says of codes that it copies: scales that it rounds."""
    found = rounded_scales(ckpt)
    return [f"the scales of {len(found)} linears (first {found[0]}) are rounded to float16"] if found else []


def _rounded(ckpt: Checkpoint, linear: str, scales: torch.Tensor) -> bool:
    try:
        return integers.rounded(scales)
    except ValueError as e:
        raise UserError(f"{linear} of {ckpt.folder} has {e}", "`llmc eval` runs the folder itself") from e


def encode(q: Quantized) -> dict[str, torch.Tensor]:
    """{last part of the name: tensor} of one linear, in the form of its type."""
    return blocks.encode(q) if isinstance(q, BlockTensor) else gptq.encode(q)


def block_type(qtype: IntegerType | BlockType) -> BlockType | None:
    """The GGUF type that holds every value of a type, None if there is none. With 4 bits, code minus zero point is -15 … 15,
    which is among the levels of Q5_0."""
    if isinstance(qtype, BlockType):
        return qtype
    name = {(4, True): "q4_0", (8, True): "q8_0", (4, False): "q5_0"}.get((qtype.bits, qtype.symmetric))
    return BLOCK_TYPES[name] if name is not None and qtype.group_size % 32 == 0 else None


def as_blocks(q: Quantized) -> BlockTensor:
    """The same values as a BlockTensor, of a type that a GGUF type holds (`block_type`). A group's scale is repeated for each
    of its blocks. The codes of symmetric types do not change."""
    if isinstance(q, BlockTensor):
        return q
    held, repeats = block_type(q.type), q.type.group_size // 32
    assert held is not None, f"no GGUF type holds {q.type.name}"
    codes = q.codes
    if q.zeros is not None:
        codes = codes + (-held.levels[0]) - q.zeros.repeat_interleave(q.type.group_size, 1)  # of uint8, from 1 to 31
    return BlockTensor(held, codes, q.scales.repeat_interleave(repeats, 1))


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
    return form_of(ckpt) == blocks.METHOD


def _module(ckpt: Checkpoint) -> Any:
    """The module that reads the folder's integers."""
    return _INTEGERS[str(form_of(ckpt))]
