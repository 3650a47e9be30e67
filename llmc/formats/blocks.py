"""llmc's own checkpoint format, version 1, for linears with GGUF block types. A GPTQ checkpoint cannot hold these types.

The folder is an ordinary Hugging Face folder. For a linear X with weight [out, in] it holds one tensor instead of X.weight:

    X.blocks uint8 [out, bytes of a row]   the bytes of the GGUF type, the same as in a .gguf file

The bytes do not contain their type. `quantization_config` of config.json gives the type of every linear.
"""

from __future__ import annotations

from typing import Any

import torch

from llmc.errors import UserError
from llmc.formats import packing
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.types import BLOCK_TYPES, BlockTensor, BlockType

METHOD = "llmc-blocks"
VERSION = 1
PARTS = ("blocks",)
AGAIN = "the folder is damaged: make it again with `llmc quantize`"


def encode(t: BlockTensor) -> dict[str, torch.Tensor]:
    """Returns {'blocks': uint8 [out, bytes of a row]} for one linear."""
    return {"blocks": torch.from_numpy(packing.pack(t))}


def config(types: dict[str, str]) -> dict[str, Any]:
    """`quantization_config` of config.json. types: {linear: name of its type} for every quantized linear."""
    return {"quant_method": METHOD, "version": VERSION, "types": types}


def quantized_linears(ckpt: Checkpoint) -> list[str]:
    """Module names (without `.blocks`) of the quantized linears, in file order. Raises UserError if a linear lacks its
    type or its tensor, or if they do not match."""
    types = _types(ckpt)
    found = [n.removesuffix(".blocks") for n in ckpt.names() if n.endswith(".blocks")]
    if lost := sorted(types.keys() - set(found)):
        raise UserError(f"config.json of {ckpt.folder} gives a type to {len(lost)} linears that have no tensor, first "
                        f"{lost[0]}.blocks", AGAIN)
    for linear in found:
        shape(ckpt, linear)
    return found


def type_of(ckpt: Checkpoint, linear: str) -> BlockType:
    """The type of a linear, from config.json."""
    types = _types(ckpt)
    if linear not in types:
        raise UserError(f"config.json of {ckpt.folder} names no type for {linear}.blocks", AGAIN)
    name = types[linear]
    if not isinstance(name, str) or name not in BLOCK_TYPES:
        raise UserError(f"config.json of {ckpt.folder} gives {linear} the type {name!r}, which this llmc does not know",
                        f"it knows {', '.join(BLOCK_TYPES)}; a newer llmc may know more")
    return BLOCK_TYPES[name]


def shape(ckpt: Checkpoint, linear: str) -> tuple[int, int]:
    """[out, in] of a linear, from the header of its tensor."""
    name, qtype = f"{linear}.blocks", type_of(ckpt, linear)
    stored = ckpt.shape(name)
    if ckpt.dtype(name) != "U8" or len(stored) != 2 or 0 in stored or stored[1] % qtype.block_bytes:
        raise UserError(f"{name} of {ckpt.folder} is {ckpt.dtype(name)} {list(stored)}, but rows of {qtype.name} are "
                        f"whole blocks of {qtype.block_bytes} bytes (U8)", AGAIN)
    return stored[0], stored[1] // qtype.block_bytes * qtype.block


def read(ckpt: Checkpoint, linear: str) -> BlockTensor:
    """One quantized linear. Raises UserError if a factor is NaN or infinite, or if a code is none of the type's."""
    shape(ckpt, linear)
    try:
        t = packing.unpack(ckpt.tensor(f"{linear}.blocks").numpy(), type_of(ckpt, linear))
    except ValueError as e:
        raise UserError(f"{linear}.blocks of {ckpt.folder} holds {e}", AGAIN) from e
    largest = max(map(abs, t.type.levels)) if t.type.exponent else 1  # float32 holds all values of a float16 factor
    for factors in (t.d, t.m):
        if factors is not None and not bool(torch.isfinite(factors * largest).all()):
            raise UserError(f"{linear}.blocks of {ckpt.folder} holds factors that are NaN or infinite", AGAIN)
    return t


def _types(ckpt: Checkpoint) -> dict[str, Any]:
    """{linear: type name} from config.json. The names are not checked."""
    c = ckpt.quantization or {}
    types = c.get("types")
    if c.get("quant_method") != METHOD or c.get("version") != VERSION:
        raise UserError(f"{ckpt.folder} is quantized as {c.get('quant_method')!r}, version {c.get('version')!r}; this "
                        f"llmc reads {METHOD!r}, version {VERSION}", "use a newer llmc, or start from the float model")
    if not isinstance(types, dict):
        raise UserError(f"quantization_config of {ckpt.folder} has no table `types`", AGAIN)
    return types
