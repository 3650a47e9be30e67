"""How quantized folders store their weights: one table. llmc reads some of these layouts, and refuses the others by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmc.errors import UserError

Config = dict[str, Any]  # quantization_config of config.json, or the file of a quantizer


@dataclass(frozen=True)
class Layout:
    """A way to store quantized weights.

    name: for messages.  method: what `quant_method` says.  holds: whether a config with this method means this layout.
    codes: the form in which llmc.formats.quantized reads its linears; None if there are none, or if it cannot.
    parts: the names of the tensors of a linear in this form; every linear has the first.
    floats: the form in which llmc.formats.decoded reads its tensors, as the values that they mean; None likewise.
    """

    name: str
    method: str
    holds: Callable[[Config], bool] = lambda _config: True
    codes: str | None = None
    parts: tuple[str, ...] = ()
    floats: str | None = None


def _weights(config: Config) -> Iterator[Config]:
    """What a config of compressed-tensors says of the weights of each group of modules."""
    groups = config.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        yield weights if isinstance(weights, dict) else {}


def _is_packed_integers(config: Config) -> bool:
    return config.get("format") == "pack-quantized" and all(w.get("type", "int") == "int" for w in _weights(config))


def _is_fp8(config: Config) -> bool:
    found = list(_weights(config))
    return bool(found) and all(w.get("type") == "float" and w.get("num_bits") == 8 for w in found)


def _says(key: str, *values: Any) -> Callable[[Config], bool]:
    return lambda config: str(config.get(key) or values[0]).lower() in values


# The first row that fits counts.
LAYOUTS = (
    Layout("GPTQ", "gptq", codes="gptq", parts=("qweight", "qzeros", "scales", "g_idx")),
    Layout("llmc's blocks", "llmc-blocks", codes="llmc-blocks", parts=("blocks",)),
    Layout("AWQ", "awq", _says("version", "gemm"), codes="awq", parts=("qweight", "qzeros", "scales")),
    Layout("compressed-tensors, packed integers", "compressed-tensors", _is_packed_integers, codes="compressed-tensors",
           parts=("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")),
    Layout("FP8 of compressed-tensors", "compressed-tensors", _is_fp8, floats="fp8"),
    Layout("FP8", "fp8", floats="fp8"),
    Layout("FP8 of FBGEMM", "fbgemm_fp8", floats="fp8"),
    Layout("FP8 of ModelOpt", "modelopt", lambda c: c.get("quant_algo") == "FP8", floats="fp8"),
    Layout("MXFP4", "mxfp4", floats="mxfp4"),
    # what llmc does not read
    Layout("AWQ in another order than that of version gemm", "awq"),
    Layout("another format of compressed-tensors (NVFP4, MXFP4, 2:4 sparse, integers with quantized inputs)",
           "compressed-tensors"),
    Layout("bitsandbytes, NF4 or FP4", "bitsandbytes", lambda c: bool(c.get("load_in_4bit") or c.get("_load_in_4bit"))),
    Layout("bitsandbytes, LLM.int8()", "bitsandbytes"),
    Layout("NVFP4 or another format of ModelOpt", "modelopt"),
    Layout("NVFP4", "nvfp4"),
    Layout("MXFP8", "mxfp8"),
    Layout("HQQ", "hqq"),
    Layout("EETQ", "eetq"),
    Layout("torchao", "torchao"),
    Layout("Quanto", "quanto"),
    Layout("AutoRound's own format", "auto-round"),
    Layout("Gemma's mobile format, 2, 4 and 8 bits with fixed ranges of inputs", "gemma"),
    Layout("AQLM", "aqlm"),
    Layout("VPTQ", "vptq"),
    Layout("SpQR", "spqr"),
    Layout("HIGGS", "higgs"),
    Layout("BitNet", "bitnet"),
    Layout("FP-Quant", "fp_quant"),
    Layout("Quark", "quark"),
)


def layout_of(config: Config | None) -> Layout:
    """The layout that a config means. An unknown method is a layout that llmc does not read."""
    config = config or {}
    method = str(config.get("quant_method"))
    return next((row for row in LAYOUTS if row.method == method and row.holds(config)), Layout("an unknown form", method))


def parts_of(form: str) -> tuple[str, ...]:
    """The parts of a linear in a form that `llmc.formats.quantized` reads."""
    return next(row.parts for row in LAYOUTS if row.codes == form)


def refused(folder: Path, config: Config | None) -> UserError:
    """The error for a folder in a layout that llmc does not read."""
    row = layout_of(config)
    known = dict.fromkeys(r.name for r in LAYOUTS if r.codes or r.floats)
    return UserError(f"{folder} is quantized as {row.method!r} ({row.name}), and llmc does not read that",
                     f"start from the float model; llmc reads {', '.join(known)}")
