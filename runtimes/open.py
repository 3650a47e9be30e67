"""The choice of an artifact's runtime: llama.cpp for a .gguf file, ONNX Runtime for an ONNX folder, torch for others."""

from __future__ import annotations

from pathlib import Path

from llmc.errors import UserError
from llmc.formats.onnx_folder import is_onnx_folder
from llmc.runtimes.base import Runtime


def open_runtime(artifact: Path, context: int, threads: int, device: str = "cpu", kv: str | None = None) -> Runtime:
    """Open an artifact in its own runtime: a .gguf file in llama.cpp, an ONNX folder in onnxruntime, any other folder
    (float or quantized) in torch.

    context: the largest number of tokens in the KV cache (the model's own context length if that is shorter).
    kv: the type of the KV cache, if the runtime offers a choice; None: the runtime's default (llama.cpp: f16).
    """
    if artifact.suffix == ".gguf":
        from llmc.runtimes.amx import use_extra_buffers
        from llmc.runtimes.llamacpp import LlamaCpp

        return LlamaCpp(artifact, context=context, threads=threads, device=device, kv_type=kv or "f16",
                        extra_buffers=use_extra_buffers())
    if is_onnx_folder(artifact):
        from llmc.runtimes.onnx_model import OnnxModel

        return _with(kv, OnnxModel(artifact, context=context, threads=threads, device=device),
                     "the graph has only this type: export the model again for another, or measure its .gguf file")
    if artifact.is_dir():
        from llmc.runtimes.torch_model import TorchModel

        return _with(kv, TorchModel(artifact, context=context, threads=threads, device=device),
                     "export it to .gguf: llama.cpp has f16 and q8_0")
    raise UserError(f"{artifact} is neither a model folder nor a .gguf file", "give one of these")


def _with(kv: str | None, runtime: Runtime, hint: str) -> Runtime:
    """The runtime, if its KV cache has the requested type; else raises UserError."""
    if kv in (None, runtime.kv_type):
        return runtime
    runtime.close()
    raise UserError(f"--kv {kv}: the KV cache of this artifact in {runtime.name} is {runtime.kv_type}", hint)
