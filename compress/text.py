"""Calibration text: read, rendered, tokenized and packed into full sequences, with its description for the manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmc.errors import UserError
from llmc.formats.template_limits import render_within_limits
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


def held_out(n: int, count: int) -> list[int]:
    """The indices of `count` held-out sequences out of n, evenly spaced over the text."""
    return sorted({i * n // count + n // (2 * count) for i in range(count)})


def load_calibration(spec: str, tokenizer: Any, samples: int | None, seq_len: int) -> Calibration:
    """Sequences from a text file, a .jsonl file (`text` or `messages` in each line) or `hf:NAME`.

    The documents are joined, tokenized and cut into sequences of `seq_len`. If there are more than `samples`, it takes evenly
    spaced ones, so that all kinds of text in a file are sampled. samples: None takes all sequences (HUB_SAMPLES of a data set
    on the hub). UserError if the text cannot be read or is too short.
    """
    if spec.startswith(HUB):
        documents = _from_hub(spec.removeprefix(HUB), tokenizer, (samples or HUB_SAMPLES) * seq_len)
    else:
        documents = _read(Path(spec), tokenizer)
    text = "\n\n".join(documents)
    if not text.strip():
        raise UserError(f"the calibration text {spec} is empty", "give a file with text like the model's later input")
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    available = len(ids) // seq_len
    samples = samples or max(1, available)
    if available < samples:
        raise UserError(
            f"the calibration text {spec} has {len(ids):,} tokens, and {samples} sequences of {seq_len} need "
            f"{samples * seq_len:,}", f"use --samples {max(1, available)}, a smaller --seq-len, or more text")
    packed = torch.tensor(ids[: available * seq_len], dtype=torch.int64).view(available, seq_len)
    chosen = [i * available // samples for i in range(samples)]
    used = tokenizer.decode(packed[chosen].flatten().tolist())
    return Calibration(packed[chosen], {
        "name": spec if spec.startswith(HUB) else Path(spec).name, "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "samples": samples, "seq_len": seq_len, "tokens": samples * seq_len, "tokens_in_text": len(ids),
        "sketch": sketch(used),
    })


def load_answers(spec: str, tokenizer: Any, seq_len: int) -> Calibration:
    """Sequences from the conversations of a .jsonl file, with `answers`: the tokens of the assistant's messages and their
    end-of-turn marks. Sequences without such a token are left out, and their number is recorded ('left_out')."""
    path = Path(spec)
    if path.suffix != ".jsonl":
        raise UserError(f"{spec} has no answers: --answers-only needs a .jsonl file of `messages`",
                        "leave out --answers-only, or give such a file")
    text, spans = "", []
    for row, where in _rows(_raw(path), path):
        text += "\n\n" if text else ""
        rendered, found = _conversation(_messages(row, tokenizer, where), tokenizer, where)
        spans += [(len(text) + a, len(text) + b) for a, b in found]
        text += rendered
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    inside = torch.zeros(len(text) + 1, dtype=torch.bool)
    for first, last in spans:
        inside[first:last] = True
    starts = torch.tensor([a for a, _ in encoded.offset_mapping], dtype=torch.int64)
    n = len(encoded.input_ids) // seq_len
    ids = torch.tensor(encoded.input_ids[: n * seq_len], dtype=torch.int64).view(n, seq_len)
    answers = inside[starts[: n * seq_len]].view(n, seq_len)
    kept = answers[:, 1:].any(1)  # no token precedes the first token of a sequence, so it cannot be predicted
    if not kept.any():
        raise UserError(f"{spec} gives no sequence of {seq_len} tokens with an answer in it",
                        "give more text, or a smaller --seq-len")
    ids, answers = ids[kept], answers[kept]
    return Calibration(ids, {
        "name": path.name, "sha256": hashlib.sha256(text.encode()).hexdigest(), "samples": ids.shape[0], "seq_len": seq_len,
        "tokens": ids.numel(), "tokens_in_text": len(encoded.input_ids), "answer_tokens": int(answers.sum()),
        "left_out": int(n - kept.sum()), "sketch": sketch(tokenizer.decode(ids.flatten().tolist())),
    }, answers)


def _conversation(messages: list[Any], tokenizer: Any, where: str) -> tuple[str, list[tuple[int, int]]]:
    """Returns (the messages rendered by the chat template, (start, end) of each assistant message in this text). UserError if
    the template renders earlier messages differently when a message is added."""
    whole, spans = _render(messages, tokenizer, where), []
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") != "assistant":
            continue
        before = _render(messages[:i], tokenizer, where, add_generation_prompt=True)
        after = _render(messages[: i + 1], tokenizer, where)
        if not (after.startswith(before) and whole.startswith(after)):
            raise UserError(f"{where}: the model's chat template changes earlier messages when one is added, so the answers "
                            "cannot be located", "give conversations with one answer each, or leave out --answers-only")
        spans.append((len(before), len(after)))
    return whole, spans


def from_model(text_ids: torch.Tensor, tokenizer: Any, origin: dict[str, Any]) -> Calibration:
    """Sequences sampled from the model (`sampling.sample_from_model`)."""
    text = tokenizer.decode(text_ids.flatten().tolist())
    return Calibration(text_ids, {
        "name": SELF, "sha256": hashlib.sha256(text_ids.numpy().tobytes()).hexdigest(), "samples": text_ids.shape[0],
        "seq_len": text_ids.shape[1], "tokens": text_ids.numel(), "sketch": sketch(text), **origin,
    })


def _raw(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as e:
        raise UserError(f"the calibration file {path} does not exist", "give a text or .jsonl file, `self` or hf:NAME") from e
    except (IsADirectoryError, PermissionError) as e:
        raise UserError(f"the calibration file {path} cannot be read: {e.strerror}", "give a text or .jsonl file") from e
    except UnicodeDecodeError as e:
        raise UserError(f"the calibration file {path} is not UTF-8 text (byte {e.start})", "save it as UTF-8") from e


def _read(path: Path, tokenizer: Any) -> list[str]:
    raw = _raw(path)
    if path.suffix != ".jsonl":
        return [raw]
    return [_document(row, tokenizer, where) for row, where in _rows(raw, path)]


def _rows(raw: str, path: Path) -> Iterator[tuple[Any, str]]:
    """(the object, its file and line) of each line of a .jsonl file. UserError if a line is not JSON."""
    for number, line in enumerate(raw.splitlines(), 1):
        if not line.strip():
            continue
        try:
            yield json.loads(line), f"{path}, line {number}"
        except ValueError as e:
            raise UserError(f"{path}, line {number} is not JSON: {e}", "each line must be one JSON object") from e


def _document(row: Any, tokenizer: Any, where: str) -> str:
    """The text of one row: its `text`, or its `messages` rendered by the model's chat template (transformers runs it in a
    sandbox)."""
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return str(row["text"])
    return _render(_messages(row, tokenizer, where), tokenizer, where)


def _messages(row: Any, tokenizer: Any, where: str) -> list[Any]:
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
        raise UserError(f"{where} has neither `text` nor `messages`", 'write {"text": "…"} or {"messages": […]}')
    if not tokenizer.chat_template:
        raise UserError(f"{where} has `messages` and the model has no chat template", "give plain `text` instead")
    return list(row["messages"])


def _render(messages: list[Any], tokenizer: Any, where: str, **more: bool) -> str:
    from jinja2 import TemplateError

    try:
        return render_within_limits(lambda: str(tokenizer.apply_chat_template(messages, tokenize=False, **more)),
                                    len(str(messages)), where)
    except (TemplateError, TypeError, KeyError, IndexError, ValueError) as e:
        raise UserError(f"{where}: the model's chat template refused the messages: {e}", "check roles and contents") from e


def _from_hub(name: str, tokenizer: Any, tokens: int) -> list[str]:
    """Rows of a data set's train split, streamed until they hold about twice the required tokens."""
    datasets = datasets_library("--calibration hf:NAME", "give a text or .jsonl file")
    try:
        rows = datasets.load_dataset(name, split="train", streaming=True)
        documents, characters = [], 0
        for number, row in enumerate(rows, 1):
            documents.append(_document(row, tokenizer, f"{name}, row {number}"))
            characters += len(documents[-1])
            if characters > tokens * 10:  # a token is rarely more than five characters
                break
    except (OSError, ValueError) as e:  # the hub's own errors and "no such data set" derive from these
        raise UserError(f"the data set {name} could not be read: {e}", "check its name and the network") from e
    return documents
