"""The writer of model.onnx and its data file. It holds one tensor in memory at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir

from llmc.console import progress
from llmc.export.onnx.emit import OnnxTensor
from llmc.formats.onnx_folder import MODEL

DATA = "model.onnx.data"
INLINE = 1024  # bytes: smaller tensors stay in model.onnx
ALIGN = 4096  # a page, so that a tensor can be mapped; smaller ones need less
SMALL = 1 << 16


def write(model: ir.Model, entries: dict[str, OnnxTensor], folder: Path) -> dict[str, np.ndarray]:
    """Write both files. Returns the builder's own tensors (norms, biases, rotary tables) by name, so that the written ones
    can be compared with them."""
    values: dict[str, Any] = dict(model.graph.initializers)
    own = {name: value.const_value.numpy() for name, value in values.items() if name not in entries}
    places: dict[str, tuple[int, int]] = {}
    with (folder / DATA).open("wb") as f, progress("writing tensor", len(values)) as p:
        for name in values:
            entry = entries.get(name)
            if entry is not None:
                places[name] = _append(f, entry.data())
            elif own[name].nbytes >= INLINE:
                places[name] = _append(f, own[name])
            p.step(name)
    for name, value in values.items():
        if at := places.get(name):
            t = value.const_value
            value.const_value = ir.ExternalTensor(DATA, at[0], at[1], t.dtype, shape=t.shape, name=name, base_dir=folder)
    ir.save(model, folder / MODEL)
    return own


def _append(f: BinaryIO, data: np.ndarray) -> tuple[int, int]:
    """Append an array's bytes to the file; return their offset and length."""
    align = ALIGN if data.nbytes >= SMALL else 64
    f.write(b"\0" * (-f.tell() % align))
    at = f.tell()
    f.write(np.ascontiguousarray(data).data.cast("B"))
    return at, data.nbytes
