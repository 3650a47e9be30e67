"""Calibration text: read, rendered, tokenized and packed into full sequences, with its description for the manifest."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmc.errors import UserError
from llmc.files import sha256
from llmc.formats.chat_template import render
from llmc.formats.text_ends import bos_of, sequences
from llmc.formats.text_files import is_table
from llmc.formats.text_rows import (
    FORMS,
    Documents,
    conversation,
    count_forms,
    gather,
    read_documents,
    rendered,
    rows_of,
)
from llmc.overlap import sketch
from llmc.sources.data_sets import datasets_library

SELF = "self"
HUB = "hf:"
HUB_SAMPLES = 512


@dataclass(frozen=True)
class Calibration:
    """sequences: int64 [samples, seq_len], without padding.  origin: the description for the manifest.  answers: bool
    [samples, seq_len], true for tokens of the assistant's messages; None if they were not requested."""

    sequences: torch.Tensor
    origin: dict[str, Any]
    answers: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        return self.sequences.numel()


def content_of(spec: str) -> str:
    """What tells one text from another without a tokenizer: the sha256 of a file, or the name of another source."""
    return sha256(Path(spec)) if Path(spec).is_file() else spec


def held_out(n: int, count: int) -> list[int]:
    """The indices of `count` held-out sequences out of n, evenly spaced over the text."""
    return sorted({i * n // count + n // (2 * count) for i in range(count)})


def load_calibration(spec: str, tokenizer: Any, samples: int | None, seq_len: int, rows: int | None = None,
                     fewer: bool = False) -> Calibration:
    """Sequences from a file (llmc/formats/text_files.py) or `hf:NAME`.

    The documents are joined, tokenized and cut into sequences of `seq_len` that begin as the tokenizer begins a text. If
    there are more than `samples`, they are taken evenly spaced over the whole text. So every kind of text is sampled.
    samples None takes them all (of a data set on the hub, HUB_SAMPLES).  fewer: a text with fewer is taken whole.
    rows: of the model's embedding; None: the ids are not compared with it.
    """
    if spec.startswith(HUB):
        documents = _from_hub(spec.removeprefix(HUB), tokenizer, (samples or HUB_SAMPLES) * seq_len)
    else:
        documents = read_documents(Path(spec), tokenizer)
    text = "\n\n".join(documents.texts)
    if not text.strip():
        raise UserError(f"the calibration text {spec} is empty", "give a file with text like the model's later input")
    ids, bos = tokenizer(text, add_special_tokens=False, verbose=False).input_ids, bos_of(tokenizer)
    check_ids(ids, rows, tokenizer, spec)
    packed = torch.from_numpy(sequences(np.array(ids, dtype=np.int64), seq_len, bos))
    available = len(packed)
    samples = max(1, available) if samples is None or (fewer and available < samples) else samples
    if available < samples:
        raise UserError(
            f"the calibration text {spec} has {len(ids):,} tokens, and {samples} sequences of {seq_len} need "
            f"{samples * seq_len:,}", f"use --samples {max(1, available)}, a smaller --seq-len, or more text")
    chosen = [i * available // samples for i in range(samples)]
    used = tokenizer.decode(packed[chosen].flatten().tolist())
    return Calibration(packed[chosen], {
        "name": spec if spec.startswith(HUB) else Path(spec).name, "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "samples": samples, "seq_len": seq_len, "tokens": samples * seq_len, "tokens_in_text": len(ids), "bos": bos,
        **documents.origin, "sketch": sketch(used),
    })


def check_ids(ids: list[int], rows: int | None, tokenizer: Any, name: str) -> None:
    """Raise UserError if an id has no row in the embedding of `rows` rows."""
    if rows is not None and ids and (highest := max(ids)) >= rows:
        raise UserError(f"the text {name} has token {highest} ({tokenizer.convert_ids_to_tokens(highest)}), and the model's "
                        f"embedding has {rows} rows", "remove this token from the text, or use the model's tokenizer files")


def load_answers(spec: str, tokenizer: Any, seq_len: int, rows: int | None = None) -> Calibration:
    """Sequences from the conversations of a file, with `answers`: the tokens of the assistant's messages and their
    end-of-turn marks. Sequences without such a token are left out, and their number is recorded ('left_out').
    rows: as for load_calibration."""
    path = Path(spec)
    if not is_table(path):
        raise UserError(f"{spec} has no answers: --answers-only needs a file of conversations, as .jsonl",
                        "leave out --answers-only, or give such a file")
    spans: list[tuple[int, int]] = []
    documents, at = Documents(), 0
    for row, where in rows_of(path):
        form, said = conversation(row, where)
        if isinstance(said, str):
            raise UserError(f"{where} has a text and no conversation: it does not tell who says what", FORMS)
        text, found = _spans(said, tokenizer, where, form)
        spans += [(at + a, at + b) for a, b in found]
        documents.add(form, text)
        at += len(text) + 2
    documents.explain(str(path))
    text = "\n\n".join(documents.texts)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    check_ids(encoded.input_ids, rows, tokenizer, spec)
    inside = np.zeros(len(text) + 1, dtype=bool)
    for first, last in spans:
        inside[first:last] = True
    starts, bos = np.array([a for a, _ in encoded.offset_mapping], dtype=np.int64), bos_of(tokenizer)
    ids = torch.from_numpy(sequences(np.array(encoded.input_ids, dtype=np.int64), seq_len, bos))
    answers = torch.from_numpy(sequences(inside[starts], seq_len, None if bos is None else False))
    kept = answers[:, 1:].any(1)  # no token precedes the first one of a sequence, so it cannot be predicted
    if not kept.any():
        raise UserError(f"{spec} gives no sequence of {seq_len} tokens with an answer in it",
                        "give more text, or a smaller --seq-len")
    left_out = int((~kept).sum())
    ids, answers = ids[kept], answers[kept]
    return Calibration(ids, {
        "name": path.name, "sha256": hashlib.sha256(text.encode()).hexdigest(), "samples": ids.shape[0], "seq_len": seq_len,
        "tokens": ids.numel(), "tokens_in_text": len(encoded.input_ids), "answer_tokens": int(answers.sum()),
        "left_out": left_out, "bos": bos, **documents.origin, "sketch": sketch(tokenizer.decode(ids.flatten().tolist())),
    }, answers)


def _spans(messages: list[Any], tokenizer: Any, where: str, form: str) -> tuple[str, list[tuple[int, int]]]:
    """Returns (the messages rendered by the chat template, (start, end) of each assistant message in this text). UserError if
    the template renders earlier messages differently when a message is added."""
    whole, spans = rendered(messages, tokenizer, where, form), []
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") != "assistant":
            continue
        before = render(tokenizer, messages[:i], where, add_generation_prompt=True)
        after = rendered(messages[: i + 1], tokenizer, where, form)
        if not (after.startswith(before) and whole.startswith(after)):
            raise UserError(f"{where}: the model's chat template changes earlier messages when one is added, so the answers "
                            "cannot be located", "give conversations with one answer each, or leave out --answers-only")
        spans.append((len(before), len(after)))
    return whole, spans


def rows_in(spec: str) -> dict[str, int]:
    """{form: number of rows} of a calibration file, for a plan. Empty for plain text, `self` and the hub's data sets."""
    return {} if spec == SELF or spec.startswith(HUB) else count_forms(Path(spec))


def from_model(text_ids: torch.Tensor, tokenizer: Any, origin: dict[str, Any]) -> Calibration:
    """Sequences sampled from the model (`sampling.sample_from_model`)."""
    text = tokenizer.decode(text_ids.flatten().tolist())
    return Calibration(text_ids, {
        "name": SELF, "sha256": hashlib.sha256(text_ids.numpy().tobytes()).hexdigest(), "samples": text_ids.shape[0],
        "seq_len": text_ids.shape[1], "tokens": text_ids.numel(), "bos": tokenizer.bos_token_id, "sketch": sketch(text),
        **origin,
    })


def _from_hub(name: str, tokenizer: Any, tokens: int) -> Documents:
    """Rows of a data set's train split, streamed until they hold about twice the required tokens."""
    datasets = datasets_library("--calibration hf:NAME", "give a text or .jsonl file")
    try:
        rows = datasets.load_dataset(name, split="train", streaming=True)
        documents = gather(((row, f"{name}, row {number}") for number, row in enumerate(rows, 1)), tokenizer, name,
                           enough=tokens * 10)  # a token is rarely more than five characters
    except (OSError, ValueError) as e:  # the hub's own errors and "no such data set" derive from these
        raise UserError(f"the data set {name} could not be read: {e}", "check its name and the network") from e
    return documents
