"""`llmc verify`: is an artifact still what its manifest says, and does it hold together?"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from llmc.errors import UserError
from llmc.files import sha256
from llmc.formats.manifest import MANIFEST, hash_folder, manifest_path, read_manifest
from llmc.formats.onnx_folder import is_onnx_folder


def verify(artifact: str | Path) -> dict[str, Any]:
    """Check an artifact's files against its manifest and against each other; works offline and changes nothing.

    Returns {'artifact', 'kind', 'files' (how many were hashed), 'problems' (one line each; empty: all is well)}.
    """
    path = Path(artifact)
    if not path.exists():
        raise UserError(f"there is no artifact {artifact}", "give a model folder or a .gguf file")
    problems: list[str] = []
    manifest = _collect(problems, partial(read_manifest, path)) or {}
    found = hash_folder(path) if path.is_dir() else {path.name: sha256(path)}
    if manifest:
        problems += _against_manifest(found, manifest.get("outputs"))
    elif not problems:
        problems.append(f"there is no {manifest_path(path)}: llmc did not make this, or its manifest was lost")
    look = _onnx_problems if is_onnx_folder(path) else _folder_problems if path.is_dir() else _gguf_problems
    _collect(problems, lambda: problems.extend(look(path)))
    return {"artifact": str(artifact), "kind": manifest.get("kind"), "files": len(found), "problems": problems}


def _collect(problems: list[str], check: Callable[[], Any]) -> Any:
    """Run a check; the UserError that stops it becomes one of the problems."""
    try:
        return check()
    except UserError as e:
        problems.append(e.problem)
        return None


def _against_manifest(found: dict[str, str], outputs: dict[str, str] | None) -> Iterator[str]:
    """Files that changed, are missing or were added since the manifest was written."""
    if not outputs:
        yield f"{MANIFEST} lists no output files"
        return
    if len(found) == len(outputs) == 1:  # a single file keeps its identity when it and its manifest are renamed
        outputs = dict.fromkeys(found, next(iter(outputs.values())))
    for name in sorted(outputs.keys() | found.keys()):
        if name not in found:
            yield f"{name} is missing"
        elif name not in outputs:
            yield f"{name} is not in {MANIFEST}: it was added afterwards"
        elif found[name] != outputs[name]:
            yield f"{name} has changed: sha256 {found[name][:16]}…, {MANIFEST} says {outputs[name][:16]}…"


def _folder_problems(folder: Path) -> Iterator[str]:
    """Does a model folder hold together: every tensor readable and finite, and what says how to read the codes true."""
    from llmc.formats.checkpoint import Checkpoint

    ckpt = Checkpoint.open(folder)
    problems: list[str] = []
    packed: set[str] = set()
    if ckpt.quantization is not None:
        from llmc.formats import quantized

        method = ckpt.quantization.get("quant_method")
        linears = quantized.linears(ckpt)
        packed = {name for linear in linears for name in quantized.parts(linear)}
        if method == "gptq":
            yield from _quantize_config_problems(ckpt.quantization, folder / "quantize_config.json")
        if not linears:
            yield f"config.json says {method}, but there is no quantized linear"
        for linear in linears:
            _collect(problems, partial(quantized.read, ckpt, linear))
    for name in sorted(set(ckpt.names()) - packed):
        _collect(problems, partial(ckpt.tensor, name))
    yield from problems


def _quantize_config_problems(config: dict[str, Any], copy: Path) -> Iterator[str]:
    """transformers reads config.json, GPTQ tools the copy: they must say the same."""
    if not copy.is_file():
        yield f"{copy.name} is missing"
        return
    try:
        other = json.loads(copy.read_text(encoding="utf-8"))
    except ValueError as e:
        yield f"{copy.name} is not valid JSON: {e}"
        return
    for key in sorted(config.keys() | other.keys()):
        if config.get(key) != other.get(key):
            yield f"{copy.name} says {key} = {other.get(key)!r}, config.json says {config.get(key)!r}"


def _onnx_problems(folder: Path) -> Iterator[str]:
    """Is the graph whole, its external data all there and inside the folder, and every float weight finite?"""
    import numpy as np
    from onnx import TensorProto

    from llmc.formats.onnx_folder import open_onnx

    source = open_onnx(folder)
    problems: list[str] = []
    floats = (TensorProto.FLOAT, TensorProto.FLOAT16)
    for tensor in source.proto.graph.initializer:
        values = _collect(problems, partial(source.array, tensor))
        if values is not None and tensor.data_type in floats and not np.isfinite(values).all():
            problems.append(f"{tensor.name} holds NaN or infinite values")
    yield from problems


def _gguf_problems(file: Path) -> Iterator[str]:
    """Can a GGUF's metadata and every tensor of its table be read?"""
    from llmc.formats.gguf import open_gguf

    if not open_gguf(file).tensors:  # opening maps each tensor, so a file that ends too early is refused there
        yield f"{file.name} holds no tensors"
