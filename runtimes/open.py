"""The choice of an artifact's runtime: one row for each format."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmc.errors import UserError
from llmc.formats.artifact import Artifact
from llmc.formats.artifacts.table import format_of, no_artifact
from llmc.runtimes.base import Runtime


def open_runtime(artifact: Path, context: int, threads: int, device: str = "cpu", kv: str | None = None) -> Runtime:
    """Open an artifact in its own runtime: a .gguf file in llama.cpp, an ONNX folder in onnxruntime, any other folder
    (float or quantized) in torch.

    context: the largest number of tokens in the KV cache (the model's own context length if that is shorter).
    kv: the type of the KV cache, if the runtime offers a choice; None: the runtime's default (llama.cpp: f16).
    """
    kind = _format(artifact)
    check_runnable(artifact)
    return OPENERS[kind.format].open(artifact, context, threads, device, kv or kind.kv_default)


def load_library(artifact: Path) -> None:
    """Import the library of an artifact's runtime and check the artifact: neither is part of the artifact's load time."""
    OPENERS[_format(artifact).format].load()
    check_runnable(artifact)


def check_runnable(artifact: Path) -> None:
    """Raise UserError for an artifact that would make its runtime abort. Only headers are read."""
    if _format(artifact).format == "gguf":
        from llmc.formats import gguf_check

        gguf_check.check_runnable(artifact)


def token_ids(artifact: Path, text: str) -> np.ndarray:
    """The ids of a text, int [n], from an artifact's own tokenizer. The model is not loaded."""
    check_runnable(artifact)
    return OPENERS[_format(artifact).format].token_ids(artifact, text)


def _format(artifact: Path) -> type[Artifact]:
    kind = format_of(artifact)
    if kind is None:
        raise no_artifact(artifact)
    return kind


@dataclass(frozen=True)
class Opener:
    """The functions of a format's runtime. Each imports the packages that it needs.

    load: imports the library. open: (artifact, context, threads, device, kv) -> the runtime.
    token_ids: (artifact, text) -> int [n].
    """

    load: Callable[[], object]
    open: Callable[[Path, int, int, str, str | None], Runtime]
    token_ids: Callable[[Path, str], np.ndarray]


def _load_llama_cpp() -> None:
    from llmc.runtimes.amx import use_extra_buffers

    use_extra_buffers()


def _open_llama_cpp(artifact: Path, context: int, threads: int, device: str, kv: str | None) -> Runtime:
    from llmc.runtimes.amx import use_extra_buffers
    from llmc.runtimes.llamacpp import LlamaCpp

    assert kv is not None  # the format has a default
    return LlamaCpp(artifact, context=context, threads=threads, device=device, kv_type=kv, extra_buffers=use_extra_buffers())


def _ids_of_llama_cpp(artifact: Path, text: str) -> np.ndarray:
    from llmc.runtimes.llamacpp import tokenize

    return tokenize(artifact, text)


def _load_onnxruntime() -> None:
    from llmc.runtimes.onnx_session import library

    library()
    for module in ("llmc.runtimes.onnx_model", "onnx"):
        importlib.import_module(module)


def _open_onnxruntime(artifact: Path, context: int, threads: int, device: str, kv: str | None) -> Runtime:
    from llmc.runtimes.onnx_model import OnnxModel

    return _with(kv, OnnxModel(artifact, context=context, threads=threads, device=device),
                 "the graph has only this type: export the model again for another, or measure its .gguf file")


def _ids_of_onnxruntime(artifact: Path, text: str) -> np.ndarray:
    from llmc.runtimes.onnx_model import tokenize

    return tokenize(artifact, text)


def _load_torch() -> None:
    for module in ("llmc.runtimes.torch_model", "transformers.models.auto.modeling_auto"):
        importlib.import_module(module)


def _open_torch(artifact: Path, context: int, threads: int, device: str, kv: str | None) -> Runtime:
    from llmc.runtimes.torch_model import TorchModel

    return _with(kv, TorchModel(artifact, context=context, threads=threads, device=device),
                 "export it to .gguf: llama.cpp has f16 and q8_0")


def _ids_of_torch(artifact: Path, text: str) -> np.ndarray:
    from llmc.runtimes.torch_model import tokenize

    return tokenize(artifact, text)


def _with(kv: str | None, runtime: Runtime, hint: str) -> Runtime:
    """The runtime, if its KV cache has the requested type; else raises UserError."""
    if kv in (None, runtime.kv_type):
        return runtime
    runtime.close()
    raise UserError(f"--kv {kv}: the KV cache of this artifact in {runtime.name} is {runtime.kv_type}", hint)


OPENERS = {
    "gguf": Opener(_load_llama_cpp, _open_llama_cpp, _ids_of_llama_cpp),
    "onnx": Opener(_load_onnxruntime, _open_onnxruntime, _ids_of_onnxruntime),
    "hf": Opener(_load_torch, _open_torch, _ids_of_torch),
}
