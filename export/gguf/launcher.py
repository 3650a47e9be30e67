"""Runs llama.cpp's converter, in a process of its own: `python launcher.py SCRIPT SPEC`. It imports nothing of llmc.

SPEC is a JSON file: {'arguments' (of the script), 'pre' (name of the pre-tokenizer; '': the converter finds it), 'raw' (write
the tensors in the converter's types, as they are), 'scoring' (of a router's outputs: 'sigmoid', 'softmax' or ''), 'found' (a
file to write: {'kinds': {tensor: type that the converter chose}, 'vocabulary': why it could not read the tokenizer, or ''})}.

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
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Of Mamba's models transformers 5 writes other words for kinds of layers, and Nemotron-H's were letters
WORDS = {"linear_attention": "mamba", "full_attention": "attention"}
LETTERS = {"mamba": "M", "attention": "*", "mlp": "-", "moe": "E"}
RENAMED = {  # {key of older config.json: (its name in `rope_parameters` of transformers 5, value if that is left out)}
    "rotary_pct": ("partial_rotary_factor", 1.0), "partial_rotary_factor": ("partial_rotary_factor", None),
    "rotary_emb_base": ("rope_theta", None), "rope_theta": ("rope_theta", None),
}


def main(script: Path, spec: dict[str, Any]) -> None:
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    sys.path[:0] = [str(script.parent / "gguf-py"), str(script.parent)]
    found: dict[str, Any] = {"kinds": {}, "vocabulary": ""}
    if not spec["raw"]:
        _write_float32(found["kinds"])
    options = []
    if (script.parent / "conversion").is_dir():
        options = _prepare(Path(spec["arguments"][0]), spec, found)
    sys.argv = [str(script), *spec["arguments"], *options]
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        Path(spec["found"]).write_text(json.dumps(found), encoding="utf-8")


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


def _prepare(folder: Path, spec: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Change what the converter reads of `folder`; return the options that it needs.

    found: takes the reason if it cannot read the tokenizer."""
    import conversion
    from conversion.base import ModelBase, TextModel

    read = ModelBase.load_hparams
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text, pre = not spec["raw"], spec["pre"]
    if spec["scoring"]:
        of_text = stored.get("text_config", stored)
        of_text.setdefault("scoring_func", spec["scoring"])
    known = conversion.TEXT_MODEL_MAP if text else conversion.MMPROJ_MODEL_MAP
    ModelBase.load_hparams = staticmethod(lambda *args, **more: spell(complete(read(*args, **more), stored), known))
    if pre:  # one added token changes the hash by which the converter finds it; llmc verifies the choice afterwards
        TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
    if not text:
        return []
    architecture = conversion.get_model_architecture(ModelBase.load_hparams(folder, False), conversion.ModelType.TEXT)
    try:
        model = conversion.get_model_class(architecture)
    except NotImplementedError:
        return []  # the converter says so
    model.set_vocab = _patient(model.set_vocab, found)
    hparams = ModelBase.load_hparams(folder, False)
    make = model.__init__  # of Mamba's models it reads config.json by itself

    def make_with(self: Any, *args: Any, **more: Any) -> None:
        make(self, *args, **{"hparams": ModelBase.load_hparams(folder, False), **more})

    model.__init__ = make_with
    share = (hparams.get("rope_parameters") or {}).get("partial_rotary_factor")
    for owner in model.__mro__:
        if share is not None and "permute" in vars(owner):
            owner.permute = staticmethod(_permuting(share))
    return ["--no-mtp"] if model.supports_mtp_export and not has_mtp(model, folder) else []


def _permuting(share: float) -> Any:
    """The converter's order of rows for a rotation of neighbours, in the first part of each head.

    The converter's own function reorders whole heads, which is wrong where a part of them is rotated. share: of that part."""

    def permute(weights: Any, heads: int, keys: int | None) -> Any:
        heads = heads if keys is None else keys
        by_head = weights.reshape(heads, weights.shape[0] // heads, *weights.shape[1:]).clone()
        rotated = int(by_head.shape[1] * share)
        pairs = by_head[:, :rotated].reshape(heads, 2, rotated // 2, *weights.shape[1:])
        by_head[:, :rotated] = pairs.swapaxes(1, 2).reshape(heads, rotated, *weights.shape[1:])
        return by_head.reshape(weights.shape)

    return permute


def _patient(set_vocab: Any, found: dict[str, Any]) -> Any:
    """A `set_vocab` that leaves the vocabulary out if it fails, and notes why: llmc then writes it from tokenizer.json.

    Many classes of the converter read one company's tokenizer only, and stop at that of a fine-tuned model."""

    def set_or_leave(model: Any) -> None:
        try:
            set_vocab(model)
        except (Exception, SystemExit) as e:
            found["vocabulary"] = f"{type(e).__name__}: {e}".strip(": ")
            for values in model.gguf_writer.kv_data:
                for key in [key for key in values if key.startswith("tokenizer.")]:
                    del values[key]

    return set_or_leave


def complete(read: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
    """config.json as transformers read it, with keys that transformers left out or renamed."""
    for key, value in stored.items():
        read.setdefault(key, value)
        if isinstance(value, list) and value and all(isinstance(word, str) for word in value):
            read[key] = value  # kinds of layers: transformers 5 reads "mamba" and hands on "linear_attention"
        if isinstance(value, dict) and isinstance(read[key], dict):
            complete(read[key], value)
    if any(str(key).startswith("mamba_") for key in read):
        _name_layers(read)
    if rope := read.get("rope_parameters"):
        for key, (name, default) in RENAMED.items():
            if (value := rope.get(name, default)) is not None:
                read.setdefault(key, value)
        if "partial_rotary_factor" in rope and "num_attention_heads" in read:
            head = read.get("head_dim") or read["hidden_size"] // read["num_attention_heads"]
            read.setdefault("attn_rotary_emb", int(head * rope["partial_rotary_factor"]))  # Bamba's name of the product
    return read


def _name_layers(read: dict[str, Any]) -> None:
    """Give the layers of a model with Mamba the names that the converter knows, in place."""
    for key in ("layer_types", "layers_block_type"):
        if isinstance(read.get(key), list):
            read[key] = [WORDS.get(word, word) for word in read[key]]
    kinds = read.get("layers_block_type") or [""]
    if all(kind in LETTERS for kind in kinds):
        read.setdefault("hybrid_override_pattern", "".join(LETTERS[kind] for kind in kinds))
        if "moe" not in kinds:
            for key in ("num_experts_per_tok", "n_routed_experts", "n_group", "topk_group"):  # of experts that it lacks
                read.pop(key, None)


def spell(read: dict[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """config.json with the converter's spelling of the architecture, where it writes other capitals than transformers."""
    by_letters = {name.lower(): name for name in known}
    names = read.get("architectures") or []
    read["architectures"] = [name if name in known else by_letters.get(name.lower(), name) for name in names]
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
