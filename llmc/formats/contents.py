"""What the tensors of a folder are: float weights, codes of a quantized model, or buffers that no model reads.

The tensors decide whether a folder is quantized. A config only says how. Integers and FP8 values are never weights by
themselves, because a weight is code times scale.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.console import warn
from llmc.errors import UserError
from llmc.files import read_json
from llmc.formats.layouts import listed
from llmc.formats.packed import layout_of

if TYPE_CHECKING:
    from llmc.formats.checkpoint import Checkpoint

CODE_TYPES = re.compile(r"[IU](?:4|8|16|32)|F[468]_.*|F4|F6|F8")  # safetensors' names
# Buffers that old checkpoints store and that transformers computes: rotary tables, causal masks, positions
_BUFFERS = re.compile(r"(?:^|\.)(?:inv_freq|cos_cached|sin_cached|masked_bias|position_ids|causal_mask)$")
_MASK = re.compile(r"\.(?:attn|attention)\.bias$")  # [1, 1, n, n]; a real bias has one axis
# Names that quantizers give the parts of a linear: GPTQ, AWQ, bitsandbytes, compressed-tensors, ModelOpt, MXFP4, llmc
_CODES = re.compile(r"(?:^|[._])(?:qweight|qzeros|g_idx|SCB|(?:nested_)?absmax|(?:nested_)?quant_map|quant_state\..+|"
                    r"weight_(?:scale|scale_inv|scale_2|zero_point|packed|shape|format|global_scale))$")
# Names that say the same if the architecture has no such parameter
_SCALES = re.compile(r"(?:^|[._])(?:scales?|scale_inv|zeros?|zero_points?|absmax|lora_[AB](?:\..+)?)$")
FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
START = "start from the float model"


def is_buffer(name: str, shape: tuple[int, ...]) -> bool:
    """Whether the name is that of a buffer that transformers computes. Its stored values are ignored."""
    return bool(_BUFFERS.search(name)) or (len(shape) == 4 and bool(_MASK.search(name)))


def codes_in(ckpt: Checkpoint) -> list[str]:
    """The tensors that are codes, or that belong to codes by their name."""
    return [n for n in ckpt.names() if ckpt.coded(n) is None and not is_buffer(n, ckpt.shape(n)) and (
        bool(_CODES.search(n)) or (len(ckpt.shape(n)) > 0 and bool(CODE_TYPES.fullmatch(ckpt.dtype(n)))))]


def quantization_of(ckpt: Checkpoint) -> dict[str, Any] | None:
    """How the codes of a folder are stored: `quantization_config` of config.json, else the file of a quantizer. None if it
    has no codes, or if no file says how. Prints a warning if a float folder has such a config."""
    said, where = _declared(ckpt.folder, ckpt.config)
    if said is None:
        return None
    if codes_in(ckpt):
        return said
    _warn_of_leftover(ckpt.folder, where, str(said.get("quant_method")))
    return None


def check(ckpt: Checkpoint) -> None:
    """Raise UserError if the folder has codes that its config does not explain."""
    codes, how = codes_in(ckpt), ckpt.quantization
    if how is not None:
        method = how.get("quant_method")
        layout = layout_of(how)
        if layout.codes is None:  # a form that llmc cannot read: quantized.linears says so
            return
        first = f".{layout.parts[0]}"
        own = {f"{n.removesuffix(first)}.{part}" for n in ckpt.names() if n.endswith(first) for part in layout.parts}
        codes = [n for n in codes if n not in own]
        if codes:
            raise UserError(f"config.json of {ckpt.folder} says {method}, and it holds {_described(ckpt, codes)}",
                            START)
    elif codes:
        raise UserError(f"{ckpt.folder} holds {_described(ckpt, codes)}, and no config says how to read "
                        "them: codes are not weights", f"{START}, or restore quantization_config in config.json")


def check_unread(ckpt: Checkpoint, unread: list[str], what: str) -> None:
    """Warn of tensors that the architecture does not read. Raise UserError if they are scales or zero points.

    what: what becomes of them, for the warning.
    """
    unread = [n for n in unread if n in ckpt and not is_buffer(n, ckpt.shape(n))]
    if scales := [n for n in unread if _SCALES.search(n) or _CODES.search(n)]:
        raise UserError(f"{ckpt.folder} has {len(scales)} tensors that its architecture does not read ({listed(scales)}). "
                        "By their names the weights are wrong without them", f"{START}; an adapter must be merged first")
    if unread:
        _warn_of_unread(ckpt.folder, tuple(unread), sum(ckpt.nbytes(n) for n in unread), what)


def _described(ckpt: Checkpoint, codes: list[str]) -> str:
    """'14 tensors of codes (I8, SCB: a, b and 12 more)'."""
    types = sorted({ckpt.dtype(n) for n in codes})
    return f"{len(codes)} tensors of a quantized model ({', '.join(types)}: {listed(codes)})"


def _declared(folder: Path, config: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """What a file says of quantization, and the file's name. None if none does."""
    for key in ("quantization_config", "compression_config"):
        if found := config.get(key):
            if not isinstance(found, dict):
                raise UserError(f"{key} of {folder / 'config.json'} is {found!r}, not an object", "correct or remove it")
            return {"quant_method": "compressed-tensors", **found} if key == "compression_config" else found, "config.json"
    for name, method in FILES.items():
        if (folder / name).is_file():
            found = read_json(folder / name)
            inner = found.get("quantization") if isinstance(found, dict) else None
            if isinstance(found, dict):
                return {"quant_method": method, **(inner if isinstance(inner, dict) else found)}, name
    return None, ""


@cache
def _warn_of_leftover(folder: Path, where: str, method: str) -> None:
    """Warn once per folder: a command opens it several times."""
    warn(f"{where} of {folder} says that the model is quantized ({method}), and every tensor is a float: it is read as a "
         "float model")


@cache
def warn_of_decoded(folder: Path, note: str) -> None:
    """Warn once per folder, like the others."""
    warn(f"{folder}: {note}")


@cache
def _warn_of_unread(folder: Path, names: tuple[str, ...], nbytes: int, what: str) -> None:
    warn(f"{folder}: {len(names)} tensors ({nbytes:,} bytes) are not part of its architecture and {what}: {listed(names)}")
