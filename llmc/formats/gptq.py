"""The GPTQ checkpoint format, version 1, as AutoGPTQ defined it and transformers, vLLM and GPTQModel read it.

A linear of weight [out, in] becomes four tensors (N = 32 / bits codes to an int32, lowest bits first):

    qweight int32   [in / N, out]       codes, packed along the input columns
    qzeros  int32   [groups, out / N]   zero points *minus one* (that is what version 1 means), packed along the rows
    scales  float16 [groups, out]
    g_idx   int32   [in]                the group of each column; here always column // group_size (`desc_act` false)

Version 2 (`checkpoint_format: gptq_v2`) stores the zero points themselves. Reading a file of one version as the other
gives garbage silently, so the label is checked against the values.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from llmc.errors import UserError
from llmc.formats import integers
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.integers import Integers, pack, unpack
from llmc.formats.packed import parts_of
from llmc.formats.types import IntegerType, QuantizedTensor

PARTS = parts_of("gptq")


def encode(q: QuantizedTensor) -> dict[str, torch.Tensor]:
    """The four tensors of one linear. Raises ValueError for a zero point of 0, which version 1 cannot store."""
    qtype = q.type
    n = q.shape[1]
    zeros = q.zeros if q.zeros is not None else torch.full_like(q.scales, qtype.zero, dtype=torch.uint8)
    if bool((zeros == 0).any()):
        raise ValueError("a zero point of 0 cannot be stored in GPTQ version 1 (it stores zero - 1)")
    return {
        "qweight": pack(q.codes.t().contiguous(), qtype.bits),
        "qzeros": pack((zeros - 1).contiguous(), qtype.bits).t().contiguous(),
        "scales": q.scales.t().contiguous(),
        "g_idx": torch.arange(n, dtype=torch.int32) // qtype.group_size,
    }


def config(qtype: IntegerType, damp: float, true_sequential: bool, layers_in_block: list[list[str]] | None,
           kept: list[str] | None = None) -> dict[str, Any]:
    """`quantization_config` of config.json, and the whole content of quantize_config.json.

    layers_in_block: the quantized linears of a decoder layer (`["self_attn.q_proj"], …`); None if all are quantized.
    Without it, readers assume that every linear of a layer is quantized, except those that `kept` names.
    """
    c: dict[str, Any] = {
        "quant_method": "gptq", "bits": qtype.bits, "group_size": qtype.group_size, "sym": qtype.symmetric,
        "desc_act": False, "static_groups": True, "damp_percent": damp, "true_sequential": true_sequential,
        "checkpoint_format": "gptq", "format": "gptq", "pack_dtype": "int32", "lm_head": False,
        "quantizer": ["llmc-toolkit"],
    }
    if layers_in_block is not None:
        c["modules_in_block_to_quantize"] = layers_in_block
    if kept:
        c["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in kept}  # as GPTQModel and vLLM read it
    return c


def quantized_linears(ckpt: Checkpoint) -> list[str]:
    """Module names (without `.qweight`) of the quantized linears, in file order. Raises UserError for a config that llmc
    cannot read."""
    _declared(ckpt)
    return [n.removesuffix(".qweight") for n in ckpt.names() if n.endswith(".qweight")]


def type_of(ckpt: Checkpoint, linear: str) -> IntegerType:
    """The type that `quantization_config` declares; of a group that is a whole row, by the linear's shape."""
    declared = _declared(ckpt)
    return declared if declared.group_size > 0 else IntegerType(declared.bits, shape(ckpt, linear)[1], declared.symmetric)


def _declared(ckpt: Checkpoint) -> IntegerType:
    """The type in `quantization_config`; group_size -1 is a whole row. Raises UserError for a form that llmc cannot read."""
    c = ckpt.quantization or {}
    if c.get("bits") not in (4, 8):
        raise UserError(f"{ckpt.folder} is GPTQ with {c.get('bits')!r} bits; llmc reads 4 or 8 bits",
                        "start from the float model")
    form, size = c.get("checkpoint_format") or c.get("format") or "gptq", c.get("group_size")
    if form not in ("gptq", "gptq_v2") or type(size) is not int or not (size == -1 or size > 0):
        raise UserError(f"{ckpt.folder} is GPTQ with checkpoint_format {form!r} and group_size {size!r}; llmc reads gptq and "
                        "gptq_v2 with a group size of -1 or more than 0", "start from the float model")
    return IntegerType(c["bits"], size, c.get("sym", True))


def shape(ckpt: Checkpoint, linear: str) -> tuple[int, int]:
    """[out, in] of a quantized linear, from the header of its codes."""
    words, out = ckpt.shape(f"{linear}.qweight")
    return out, words * 32 // _declared(ckpt).bits


def scales_name(linear: str) -> str:
    """The tensor of its scales."""
    return f"{linear}.scales"


def order(ckpt: Checkpoint, linear: str) -> torch.Tensor | None:
    """int64 [in], the group of each column. None if column i is in group i // group_size."""
    if f"{linear}.g_idx" not in ckpt:
        return None
    found = integers.order(ckpt, f"{linear}.g_idx", type_of(ckpt, linear), shape(ckpt, linear)[1])
    if found is not None and not (ckpt.quantization or {}).get("desc_act"):
        raise UserError(f"{linear} of {ckpt.folder} has a permuted g_idx, and its config says that columns are in order "
                        "(desc_act false)", "the folder is damaged or its label is wrong: make or download it again")
    return found


def read(ckpt: Checkpoint, linear: str) -> Integers:
    """One quantized linear, codes [out, in]. Accepts versions 1 and 2. Raises UserError if the zero points contradict the
    version label."""
    qtype = type_of(ckpt, linear)
    bits = qtype.bits
    if missing := [part for part in PARTS[:3] if f"{linear}.{part}" not in ckpt]:
        raise UserError(f"{linear}.{' and '.join(missing)} is missing from {ckpt.folder}", "make or download it again")
    codes = unpack(ckpt.tensor(f"{linear}.qweight"), bits).t().contiguous()
    scales = ckpt.tensor(f"{linear}.scales").t().contiguous()
    stored = unpack(ckpt.tensor(f"{linear}.qzeros").t().contiguous(), bits)
    c = ckpt.quantization or {}
    v2 = (c.get("checkpoint_format") or c.get("format") or "gptq") == "gptq_v2"
    zeros = stored if v2 else (stored + 1) & 0xFF
    if qtype.symmetric:
        if not bool((zeros == qtype.zero).all()):
            raise UserError(f"{linear} of {ckpt.folder} is labelled sym, {'v2' if v2 else 'v1'}, but its zero points are "
                            f"{int(zeros.min())}…{int(zeros.max())}, not {qtype.zero}",
                            "its checkpoint_format label is wrong: correct it or quantize again")
        return Integers(qtype, codes, scales)
    return Integers(qtype, codes, scales, zeros)
