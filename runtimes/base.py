"""What a runtime is: an artifact opened by the program that will run it on the device.

Every runtime is fed token ids and gives logits, so that figures from different runtimes can be held side by side.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

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

    def tokenize(self, text: str, special: bool = True) -> np.ndarray:
        """The artifact's own tokenizer: int32 [n]; `special` adds BOS where the tokenizer does."""

    def detokenize(self, ids: list[int]) -> str:
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
