"""Turns a tiny float model into a quantized folder by plain rounding: exporters are tested without a quantizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from llmc.formats import gptq
from llmc.formats.checkpoint import TOKENIZER_FILES, Checkpoint
from llmc.formats.types import IntegerType, QuantizedTensor


def round_to(qtype: IntegerType, w: torch.Tensor) -> QuantizedTensor:
    """float [out, in] -> the type, scales from the largest weight of each group."""
    groups = w.float().view(w.shape[0], -1, qtype.group_size)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if qtype.symmetric:
        scales = (groups.abs().amax(-1) / (qtype.zero - 0.5)).clamp(min=1e-6).half()
        zeros, zero = None, torch.tensor(float(qtype.zero))
    else:
        scales = ((high - low) / qtype.max_code).clamp(min=1e-6).half()
        zeros = (-low / scales).round().clamp(1, qtype.max_code).to(torch.uint8)
        zero = zeros.float().unsqueeze(-1)
    codes = (groups / scales.float().unsqueeze(-1) + zero).round().clamp(0, qtype.max_code).to(torch.uint8)
    return QuantizedTensor(qtype, codes.view(w.shape), scales, zeros)


def is_decoder_linear(name: str) -> bool:
    inside = ".layers." in name or ".h." in name
    return inside and name.endswith(".weight") and not any(x in name for x in ("norm", "ln_"))


def write_folder(source: Path, out: Path, encode: Callable[[str, torch.Tensor], dict[str, torch.Tensor] | None],
                 quantization: dict[str, Any]) -> None:
    """Write `out`: the float folder `source` with other weights and a `quantization_config`.

    encode: what a tensor, given by its name and as [out, in], is stored as by part of its module (None: as it is).
    """
    ckpt = Checkpoint.open(source)
    conv1d = ckpt.config["model_type"] == "gpt2"
    tensors: dict[str, torch.Tensor] = {}
    for name in ckpt.names():
        t = ckpt.tensor(name)
        parts = encode(name, t.t() if conv1d else t)
        module = name.removesuffix(".weight")
        tensors.update({name: t} if parts is None else {f"{module}.{part}": v for part, v in parts.items()})
    out.mkdir()
    for file in source.iterdir():
        if file.name in (*TOKENIZER_FILES, "generation_config.json"):
            shutil.copy(file, out)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps({**ckpt.config, "quantization_config": quantization}))


def gptq_folder(
    source: Path, out: Path, qtype: IntegerType, chosen: Callable[[str], bool] = is_decoder_linear,
    change: Callable[[QuantizedTensor], QuantizedTensor] = lambda q: q,
) -> dict[str, QuantizedTensor]:
    """Write `out`; returns what was stored by linear. `change` may replace a rounded tensor before it is stored."""
    stored: dict[str, QuantizedTensor] = {}

    def encode(name: str, t: torch.Tensor) -> dict[str, torch.Tensor] | None:
        if not chosen(name) or t.ndim != 2:
            return None
        q = stored[name.removesuffix(".weight")] = change(round_to(qtype, t))
        return gptq.encode(q)

    write_folder(source, out, encode, gptq.config(qtype, 0.01, True, None))
    return stored
