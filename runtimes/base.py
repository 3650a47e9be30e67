"""What a runtime is: an artifact opened by the program that will run it on the device.

Every runtime is fed token ids and gives logits, so that figures from different runtimes can be held side by side.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llmc.errors import UserError
from llmc.onnx_folder import is_onnx_folder

TOO_LONG = "shorten the text, or raise the context as far as the model was trained for"


class Runtime(Protocol):
    """One loaded artifact. Not safe for use from several threads."""

    name: str
    """'torch', 'llama.cpp' or 'onnxruntime'."""
    vocab_size: int
    context: int
    """The most tokens that fit: what was asked for, or fewer where the model was trained for fewer."""

    def logits(self, ids: np.ndarray, start: int = 0) -> np.ndarray:
        """ids int [n] from an empty context -> float32 [n - start, vocab]; row i predicts token start + i + 1."""

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        """Empty the KV cache, run ids int [n] through it; float32 [vocab], the logits after the last token."""

    def decode(self, token: int) -> np.ndarray:
        """One more token on the KV cache; float32 [vocab], the logits after it."""

    def tokenise(self, text: str, special: bool = True) -> np.ndarray:
        """The artifact's own tokenizer: int32 [n]; `special` adds BOS where the tokenizer does."""

    def detokenise(self, ids: list[int]) -> str:
        """Text of some tokens, special tokens left out."""

    def chat(self, user: str) -> str:
        """The prompt that the artifact's chat template makes of one user message, up to the answer's first token."""

    @property
    def kv_type(self) -> str:
        """Of the KV cache's elements: 'f16', 'f32', 'q8_0', …"""

    @property
    def end_tokens(self) -> frozenset[int]:
        """Ids that end a generation."""

    def describe(self) -> dict[str, Any]:
        """What really ran: runtime, version, device, threads, dtype, CPU features."""

    def close(self) -> None:
        """Free the model."""


def locate(artifact: str) -> Path:
    """The file or folder that the user means: a .gguf stays one (it runs as it is), a hub id becomes its folder."""
    from llmc.sources import resolve_model

    path = Path(artifact).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return path
    return resolve_model(artifact)


def open_runtime(artifact: Path, context: int, threads: int, device: str = "cpu", kv: str | None = None) -> Runtime:
    """Open an artifact in its own runtime: a .gguf file in llama.cpp, an ONNX folder in onnxruntime, any other folder
    (float or quantised) in torch.

    context: the most tokens that will be in the KV cache at once (a model trained for fewer takes fewer).
    kv: type of the KV cache, where the runtime has a choice; None: the runtime's own (llama.cpp: f16)
    """
    if artifact.suffix == ".gguf":
        from llmc.runtimes.llamacpp import LlamaCpp

        return LlamaCpp(artifact, context=context, threads=threads, device=device, kv_type=kv or "f16")
    if is_onnx_folder(artifact):
        from llmc.runtimes.onnx_model import OnnxModel

        return _with(kv, OnnxModel(artifact, context=context, threads=threads, device=device),
                     "the graph decides: it has no other; export it anew for another, or measure its .gguf file")
    if artifact.is_dir():
        from llmc.runtimes.torch_model import TorchModel

        return _with(kv, TorchModel(artifact, context=context, threads=threads, device=device),
                     "export it to .gguf: llama.cpp has f16 and q8_0")
    raise UserError(f"{artifact} is neither a model folder nor a .gguf file", "give one of these")


def _with(kv: str | None, runtime: Runtime, hint: str) -> Runtime:
    """The runtime, if its KV cache is of the type that was asked for."""
    if kv in (None, runtime.kv_type):
        return runtime
    runtime.close()
    raise UserError(f"--kv {kv}: the KV cache of this artifact in {runtime.name} is {runtime.kv_type}", hint)
