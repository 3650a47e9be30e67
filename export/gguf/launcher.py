"""Runs llama.cpp's converter, in a process of its own: `python launcher.py SCRIPT SPEC`. It imports nothing of llmc.

SPEC is a JSON file: {'arguments' (of the script), 'pre' (name of the pre-tokenizer; '': the converter finds it), 'raw' (write
the tensors in the converter's types, as they are), 'kinds' (a file to write: {tensor: type that the converter chose})}.

Without 'raw' every float tensor is written as float32, whatever --outtype says: llmc looks for rows by value, and decides
about the types with what the converter chose. What only the package `conversion` of newer checkouts has is changed there:
options that the folder needs, and keys of config.json that transformers leaves out.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import threading
import time
from pathlib import Path
from typing import Any

RENAMED = {  # {key of older config.json: (its name in `rope_parameters` of transformers 5, value if that is left out)}
    "rotary_pct": ("partial_rotary_factor", 1.0), "partial_rotary_factor": ("partial_rotary_factor", None),
    "rotary_emb_base": ("rope_theta", None), "rope_theta": ("rope_theta", None),
}


def main(script: Path, spec: dict[str, Any]) -> None:
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    sys.path[:0] = [str(script.parent / "gguf-py"), str(script.parent)]
    kinds: dict[str, str] = {}
    if not spec["raw"]:
        _write_float32(kinds)
    options = []
    if (script.parent / "conversion").is_dir():
        options = _prepare(Path(spec["arguments"][0]), spec["pre"], text=not spec["raw"])
    sys.argv = [str(script), *spec["arguments"], *options]
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        Path(spec["kinds"]).write_text(json.dumps(kinds), encoding="utf-8")


def _end_with_parent(parent: int) -> None:
    """If llmc is killed, nobody waits for the file."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _write_float32(kinds: dict[str, str]) -> None:
    """Let every float tensor be written as float32, and note in `kinds` the type that the converter chose."""
    import gguf

    f32, sizes = gguf.GGMLQuantizationType.F32, gguf.GGML_QUANT_SIZES
    quantize, add_tensor = gguf.quants.quantize, gguf.GGUFWriter.add_tensor

    def checked(data: Any, kind: Any) -> Any:
        if data.shape[-1] % sizes[kind][0]:
            raise gguf.QuantError(f"rows of {data.shape[-1]} are no whole blocks of {kind.name}")
        return data

    def add(self: Any, name: str, tensor: Any, raw_shape: Any = None, raw_dtype: Any = None, **more: Any) -> None:
        if tensor.dtype == "float32":
            kinds[name] = (f32 if raw_dtype is None else raw_dtype).name
            raw_dtype = f32
        add_tensor(self, name, tensor, raw_shape, raw_dtype, **more)

    setattr(gguf.quants, "quantize", lambda data, kind: quantize(checked(data, kind), f32))  # noqa: B010
    setattr(gguf.GGUFWriter, "add_tensor", add)  # noqa: B010
    if chunked := getattr(gguf, "LazyChunkedTensor", None):
        whole = chunked.quantize
        chunked.quantize = lambda self, kind: whole(checked(self, kind), f32)


def _prepare(folder: Path, pre: str, text: bool) -> list[str]:
    """Change what the converter reads of `folder`; return the options that it needs. text: it converts the text model."""
    import conversion
    from conversion.base import ModelBase, TextModel

    read = ModelBase.load_hparams
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    ModelBase.load_hparams = staticmethod(lambda *args, **more: complete(read(*args, **more), stored))
    if pre:  # one added token changes the hash by which the converter finds it; llmc verifies the choice afterwards
        TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
    if not text:
        return []
    architecture = conversion.get_model_architecture(ModelBase.load_hparams(folder, False), conversion.ModelType.TEXT)
    try:
        model = conversion.get_model_class(architecture)
    except NotImplementedError:
        return []  # the converter says so
    return ["--no-mtp"] if model.supports_mtp_export and not has_mtp(model, folder) else []


def complete(read: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
    """config.json as transformers read it, with keys that transformers left out or renamed."""
    for key, value in stored.items():
        read.setdefault(key, value)
        if isinstance(value, list) and value and all(isinstance(word, str) for word in value):
            read[key] = value  # kinds of layers: transformers 5 reads "mamba" and hands on "linear_attention"
        if isinstance(value, dict) and isinstance(read[key], dict):
            complete(read[key], value)
    if rope := read.get("rope_parameters"):
        for key, (name, default) in RENAMED.items():
            if (value := rope.get(name, default)) is not None:
                read.setdefault(key, value)
    return read


def has_mtp(model: Any, folder: Path) -> bool:
    """Whether the folder has tensors that the converter leaves out with --no-mtp."""
    found = []
    for without in (False, True):
        probe = type("Probe", (model,), {"model_arch": model.model_arch, "no_mtp": without, "__init__": lambda self: None})()
        probe.dir_model, probe.lazy, probe.is_mistral_format = folder, True, False
        probe.hparams = model.load_hparams(folder, False)
        probe.hparams = {**probe.hparams, **probe.hparams.get("text_config", {})}
        found.append(set(probe.index_tensors()))
    return found[0] != found[1]


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))
