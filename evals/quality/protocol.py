"""The evaluation protocol: how a text is fed to a model. It is stored with the results, because two results are comparable
only if their protocols are equal.

The protocol is that of llama.cpp's tools/perplexity/perplexity.cpp:
1. Tokenize the whole text once. Add BOS in front if the tokenizer adds one.
2. Cut it into chunks of `context` tokens that do not overlap.
3. Replace the first token of each chunk by BOS, if the tokenizer adds one.
4. Score the tokens after index context/2 of each chunk: context - context/2 - 1 tokens. So every scored token has at least
   half a context before it.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, cast

import numpy as np

from llmc.errors import UserError
from llmc.evals.report.schema import TextProtocol
from llmc.files import sha256
from llmc.formats.checkpoint import TOKENIZER_FILES
from llmc.formats.text_ends import bos_of, sequences
from llmc.runtimes.base import Runtime


class Tokenizer(Protocol):
    """Converts text to token ids for an evaluation."""

    sha256: str
    bos: int | None
    """The id that the tokenizer adds in front of a text; None if it adds none."""

    def encode(self, text: str) -> np.ndarray:
        """Token ids of `text`, int32 [n], without special tokens."""

    def decode(self, ids: np.ndarray) -> str:
        """The text of `ids`, int [n]."""


class FolderTokenizer:
    """The tokenizer of a Hugging Face folder."""

    def __init__(self, folder: Path) -> None:
        from llmc.formats.hf import load_tokenizer

        self._tokenizer = load_tokenizer(folder)
        self._tokenizer.model_max_length = 1 << 40  # no limit: the whole text is tokenized, and `cut` makes the chunks
        self.sha256 = hash_tokenizer(folder)
        self.bos: int | None = bos_of(self._tokenizer)

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)

    def decode(self, ids: np.ndarray) -> str:
        return str(self._tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False))


class RuntimeTokenizer:
    """The tokenizer inside an artifact. It is used if there is no Hugging Face folder with a tokenizer."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.sha256 = hashlib.sha256(
            "\0".join(runtime.detokenize([i]) for i in range(runtime.vocab_size)).encode()
        ).hexdigest()
        plain, special = runtime.tokenize("a", special=False), runtime.tokenize("a", special=True)
        self.bos: int | None = int(special[0]) if len(special) > len(plain) and special[0] != plain[0] else None

    def encode(self, text: str) -> np.ndarray:
        return self._runtime.tokenize(text, special=False)

    def decode(self, ids: np.ndarray) -> str:
        return self._runtime.detokenize(ids.tolist())


def hash_tokenizer(folder: Path) -> str:
    """sha256 of the vocabulary file: the first that exists of tokenizer.json, tokenizer.model, vocab.json, …"""
    for name in TOKENIZER_FILES:
        if name not in ("tokenizer_config.json", "special_tokens_map.json") and (folder / name).is_file():
            return sha256(folder / name)
    raise UserError(f"{folder} has no tokenizer file", "copy the base model's tokenizer files into it")


@dataclass(frozen=True)
class EvalProtocol:
    """The protocol as a report stores it. The fields are explained at `TextProtocol`."""

    text: str
    text_sha256: str
    tokenizer_sha256: str
    ids_sha256: str
    context: int
    stride: int
    scored: str
    bos: str
    chunks: int
    scored_tokens: int
    bytes: int

    def as_dict(self, vocabulary: int) -> TextProtocol:
        """The section of a report. vocabulary: number of tokens that both models have."""
        return cast(TextProtocol, {**asdict(self), "vocabulary": vocabulary})


@dataclass(frozen=True)
class Chunks:
    """A text, ready to be evaluated. ids: int32 [chunks, context], with BOS. The logits at positions first to context - 2
    predict the scored tokens ids[:, first + 1:]."""

    protocol: EvalProtocol
    ids: np.ndarray
    first: int


def cut(name: str, text: str, tokenizer: Tokenizer, context: int, chunks: int) -> Chunks:
    """Tokenize `text` and cut it into chunks of `context` tokens. chunks: the largest number of chunks, 0 for all.

    Raises UserError if the text is shorter than one chunk.
    """
    ids = tokenizer.encode(text)
    every = sequences(ids, context, tokenizer.bos)
    available = len(every)
    if available == 0:
        raise UserError(f"the text {name} has {len(ids)} tokens, fewer than one chunk of {context}",
                        "give a longer text or a smaller --context")
    taken = min(available, chunks or available)
    cut_ids = every[:taken]
    first = context // 2
    length = sum(len(tokenizer.decode(chunk[first + 1 :]).encode()) for chunk in cut_ids)
    protocol = EvalProtocol(
        text=name, text_sha256=hashlib.sha256(text.encode()).hexdigest(), tokenizer_sha256=tokenizer.sha256,
        ids_sha256=hashlib.sha256(cut_ids.astype("<i4").tobytes()).hexdigest(), context=context, stride=context,
        scored=f"tokens {first + 1} to {context - 1} of each chunk (counted from 0)",
        bos="replaces the first token of each chunk" if tokenizer.bos is not None else "none",
        chunks=taken, scored_tokens=taken * (context - 1 - first), bytes=length,
    )
    return Chunks(protocol, cut_ids, first)
