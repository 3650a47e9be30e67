"""Folders that are no model folder: what they are, and the next step. No weights are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llmc.errors import UserError
from llmc.small_files import read_json_object

ADAPTER = "adapter_config.json"
MERGE = "`PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder)` of peft"
OWN_ONNX = "give the model that it was made from; `llmc export --format onnx` writes ONNX that llmc can run"


def listed(names: Sequence[str], most: int = 3) -> str:
    """'a, b, c and 4 more'."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def refuse_adapter(folder: Path) -> None:
    """Raise UserError if an adapter (LoRA and others, of peft) lies in the folder, alone or beside a model."""
    found = [p.name for p in (folder / ADAPTER, *sorted(folder.glob("adapter_model.*"))) if p.is_file()]
    if not found:
        return
    what = _adapter(folder / ADAPTER)
    if (folder / "config.json").is_file():
        raise UserError(f"{folder} has {what} beside its model ({listed(found)}). transformers runs the model with the "
                        "adapter, and the model's files do not have it",
                        f"merge it first: {MERGE}; or move the adapter's files to another folder")
    raise UserError(f"{folder} is {what}, not a model", f"merge it into its base model first: {MERGE}")


def _adapter(path: Path) -> str:
    """'a LORA adapter of org/base'."""
    try:
        values = read_json_object(path) if path.is_file() else {}
    except UserError:  # that it is an adapter is certain
        values = {}
    base = values.get("base_model_name_or_path")
    return f"a {values.get('peft_type', 'peft')} adapter" + (f" of {base}" if base else "")


def no_config(folder: Path) -> UserError:
    """The error for a folder without config.json."""
    refuse_adapter(folder)
    problem = f"{folder} has no config.json"
    snapshots = sorted(p.parent for p in folder.glob("snapshots/*/config.json"))
    if snapshots:
        return UserError(f"{folder} is a folder of the hub's cache: the model is below it", f"give {snapshots[-1]}")
    if (folder / "model_index.json").is_file():
        return UserError(f"{folder} is a pipeline of diffusers (model_index.json), not a language model",
                         "llmc needs a causal language model")
    if (folder / "params.json").is_file():
        return UserError(f"{problem}: params.json is the config of another format (Meta's or Mistral's own)",
                         "give the model in Hugging Face's format, which has a config.json")
    if gguf := sorted(folder.glob("*.gguf")):
        return UserError(f"{problem}, but {len(gguf)} .gguf files", f"give one of these files: {gguf[0]}")
    if sorted(folder.glob("*.onnx")):
        return UserError(f"{problem} and holds ONNX files of another tool (transformers.js, optimum)", OWN_ONNX)
    if below := sorted(p.parent for p in folder.glob("*/config.json")):
        return UserError(f"{problem}; {len(below)} folders in it have one", f"give one of them: {below[0]}")
    return UserError(problem, "give a Hugging Face model folder")


def no_weights(folder: Path) -> UserError:
    """The error for a folder with config.json and without model.safetensors or its index."""
    def files(*patterns: str) -> list[str]:
        return sorted(p.relative_to(folder).as_posix() for pattern in patterns for p in folder.glob(pattern))

    lacking = f"{folder} has no model.safetensors and no model.safetensors.index.json"
    if parts := files("model-*-of-*.safetensors"):
        return UserError(f"{lacking}, but parts of a model ({listed(parts)})", "download the index too")
    if others := files("*.safetensors"):
        return UserError(f"{lacking}, but {listed(others)}",
                         "if that file is the whole model with Hugging Face's names, rename it to model.safetensors")
    if pickles := files("*.bin", "*.pt", "*.pth", "*.ckpt"):
        return UserError(f"{folder} has only pickle weights ({pickles[0]}), which can run code when read",
                         "convert it to safetensors first (`save_pretrained` of transformers does)")
    if onnx := files("*.onnx", "onnx/*.onnx"):
        return UserError(f"{folder} holds ONNX files of another tool (transformers.js, optimum; {listed(onnx)}) and no "
                         "safetensors", OWN_ONNX)
    if gguf := files("*.gguf"):
        return UserError(f"{lacking}, but .gguf files", f"give one of them: {folder / gguf[0]}")
    if other := files("*.h5", "*.msgpack", "*.npz"):
        return UserError(f"{lacking}, but weights of another library ({other[0]})",
                         "load it with transformers and save it with `save_pretrained`")
    return UserError(lacking, "give a model folder with safetensors weights")
