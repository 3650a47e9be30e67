"""The vision or audio part of a multimodal model as a second file, `mmproj-….gguf`, made by llama.cpp's converter.

llama.cpp's multimodal tools read it beside the file of the text model. Its matrices stay floats. The converter's types are
kept; llmc checks that the file is whole, is such a part, and holds no NaN.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from llmc.console import say, size
from llmc.errors import UserError
from llmc.export.gguf.blocks import Kind
from llmc.export.gguf.run_converter import run
from llmc.formats.gguf import field, open_gguf
from llmc.formats.manifest import check_output, new_manifest, staged_artifact

ARCHITECTURE = "clip"  # llama.cpp's name for all of them


def convert(script: Path, folder: Path, out: Path, kind: str) -> Path:
    """Convert the vision or audio part of a float folder to the file `out`; return it. kind: --outtype of the converter."""
    run(script, folder, out, "--mmproj", "--outtype", kind, raw=True)
    reader = open_gguf(out)
    if field(reader, "general.architecture") != ARCHITECTURE or not reader.tensors:
        raise UserError(f"llama.cpp's converter made no vision or audio part of {folder.name}", "leave --mmproj out")
    for t in reader.tensors:
        if t.tensor_type in (Kind.F32, Kind.F16) and not np.isfinite(t.data).all():
            raise UserError(f"{t.name} of the vision or audio part has NaN or infinity as {t.tensor_type.name}",
                            "choose --mmproj f32 or bf16, or download the model again")
    return out


def beside(out: Path, kind: str) -> Path:
    """The path of the file beside that of the text model."""
    return out.with_name(f"mmproj-{out.stem}-{kind}.gguf")


def publish(made: Path, out: Path, kind: str, source: dict[str, Any], passes: list[dict[str, Any]]) -> dict[str, Any]:
    """Move the file that `convert` made beside `out`, with a manifest; return its report."""
    path = beside(out, kind)
    check_output(path, "gguf")
    tensors = open_gguf(made).tensors
    report: dict[str, Any] = {"path": str(path), "type": kind, "bytes": made.stat().st_size, "tensors": len(tensors),
              "parameters": sum(int(np.prod(t.shape)) for t in tensors)}
    with staged_artifact(path) as (tmp, manifest):
        os.replace(made, tmp)
        measured = {k: v for k, v in report.items() if k != "path"}
        this = {"name": "export-mmproj", "config": {"mmproj": kind}, **measured}
        manifest.update(new_manifest("gguf", source, [*passes, this]))
    say(f"wrote {path}: {size(report['bytes'])}, the vision or audio part")
    return report
