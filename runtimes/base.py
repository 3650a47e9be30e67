"""The interface of a runtime: an artifact opened by the program that runs it on the device.

Every runtime takes token ids and returns logits, so that results of different runtimes can be compared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llmc.errors import UserError

TOO_LONG = "shorten the text, or raise the context as far as the model was trained for"


class NoTokenizerError(UserError):
    """An artifact without a tokenizer was asked for token ids or text."""

    def __init__(self, artifact: Path) -> None:
        super().__init__(f"{artifact} holds no tokenizer", "give a file with a tokenizer; `llmc eval` takes that of --base")


class Runtime(Protocol):
    """One loaded artifact. Not safe for use from several threads."""

    name: str
    """'torch', 'llama.cpp' or 'onnxruntime'."""
    vocab_size: int
    context: int
    """The context length in tokens: the requested one, or the model's own if that is shorter."""

    def logits(self, ids: np.ndarray, start: int = 0) -> np.ndarray:
        """ids int [n] from an empty context -> float32 [n - start, vocab]; row i predicts token start + i + 1."""

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        """Clear the KV cache and run ids int [n]; return the logits after the last token, float32 [vocab]."""

    def decode(self, token: int) -> np.ndarray:
        """Add one token to the KV cache; return the logits after it, float32 [vocab]."""

    def tokenize(self, text: str, special: bool = True) -> np.ndarray:
        """Token ids int32 [n] from the artifact's own tokenizer; `special` adds BOS if the tokenizer does."""

    def detokenize(self, ids: list[int]) -> str:
        """The text of some tokens, without special tokens."""

    def chat(self, user: str) -> str:
        """One user message in the artifact's chat template, up to the first token of the answer."""

    @property
    def kv_type(self) -> str:
        """The type of the KV cache's elements, such as 'f16', 'f32' or 'q8_0'."""

    @property
    def end_tokens(self) -> frozenset[int]:
        """The ids that end a generation."""

    def describe(self) -> dict[str, Any]:
        """The facts of this run: runtime, version, device, threads, dtype, CPU features."""

    def close(self) -> None:
        """Free the model."""
