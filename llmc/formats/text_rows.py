"""Rows of text in the forms that data sets have, as documents. Conversations go through the model's chat template.

| form | row | document |
|---|---|---|
| text | {"text"}, or a string | the text |
| messages | {"messages": [{"role", "content"}]}, or such a list | the rendered conversation |
| conversations | {"conversations": [{"from", "value"}]} (ShareGPT) | the rendered conversation |
| preference | {"chosen", "rejected"}, with or without "prompt" | the chosen conversation; the rejected one is left out |
| instruction | {"instruction", "input", "output"} | a question with its input, and the answer |
| prompt | {"prompt", "completion"} or {"prompt", "response"} | a question and the answer |
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmc.errors import UserError
from llmc.formats.chat_template import render
from llmc.formats.text_files import LATER, MOST_BYTES, is_table, read_plain, read_rows, warn_of_columns, warn_once

Said = list[Any]  # messages, each {"role", "content"}
FORMS = ('write each row as {"text": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]}; {"conversations"}, '
         '{"instruction", "input", "output"}, {"prompt", "completion"} and {"chosen", "rejected"} are known too')
ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
         "chatgpt": "assistant", "bot": "assistant", "model": "assistant", "tool": "tool", "function": "tool",
         "observation": "tool"}
KEYS = {"text": ("text",), "messages": ("messages",), "conversations": ("conversations", "system"),
        "preference": ("prompt", "chosen", "rejected", "system"),
        "instruction": ("instruction", "input", "context", "output", "response", "system"),
        "prompt": ("prompt", "completion", "response", "system")}
AS_WRITTEN = ("text", "messages")  # forms that need no interpretation
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass
class Documents:
    """texts: one for each row, or one of a plain file. rows: {form: number of rows}, empty for a plain file. replaced: halves
    of characters (lone surrogates) that became U+FFFD."""

    texts: list[str] = field(default_factory=list)
    rows: Counter[str] = field(default_factory=Counter)
    replaced: int = 0

    def add(self, form: str, text: str) -> None:
        """Add the document of one row."""
        text, replaced = whole(text)
        self.texts.append(text)
        self.rows[form] += 1
        self.replaced += replaced

    def explain(self, name: str) -> None:
        """Warn of what was interpreted or replaced."""
        for form, count in self.rows.items():
            if form not in AS_WRITTEN:
                what = "the answer that was chosen" if form == "preference" else "a conversation"
                warn_once(f"{name}: {count} rows of the form {form!r} are read as {what}, in the model's chat template")
        if self.replaced:
            warn_once(f"{name}: {self.replaced} halves of characters (lone surrogates) became U+FFFD")

    @property
    def origin(self) -> dict[str, Any]:
        """What a manifest records."""
        return ({"rows": dict(self.rows)} if self.rows else {}) | ({"replaced": self.replaced} if self.replaced else {})


def read_documents(path: Path, tokenizer: Any) -> Documents:
    """The documents of a file. tokenizer: transformers' of the model, for its chat template; None if there is none."""
    if not is_table(path):
        return Documents([read_plain(path)])
    return gather(rows_of(path), tokenizer, str(path))


def rows_of(path: Path) -> Iterable[tuple[Any, str]]:
    """The rows of a file. Warns of the columns that are not read, by the first row."""
    for number, (row, where) in enumerate(read_rows(path)):
        if number == 0:
            warn_of_columns(path, row, KEYS[conversation(row, where)[0]])
        yield row, where


def gather(rows: Iterable[tuple[Any, str]], tokenizer: Any, name: str, enough: int | None = None) -> Documents:
    """The documents of rows. Says how they were read. enough: characters after which the other rows are not read."""
    found, size = Documents(), 0
    for row, where in rows:
        form, said = conversation(row, where)
        found.add(form, said if isinstance(said, str) else rendered(said, tokenizer, where, form))
        size += len(found.texts[-1])
        if enough is not None and size > enough:
            break
        if size > MOST_BYTES:
            raise UserError(f"{name} has more than {MOST_BYTES:,} characters of text", LATER)
    found.explain(name)
    return found


def count_forms(path: Path) -> dict[str, int]:
    """{form: number of rows} of a file, without a model. Empty for plain text."""
    return dict(Counter(conversation(row, where)[0] for row, where in rows_of(path))) if is_table(path) else {}


def described(rows: dict[str, int]) -> str:
    """Counts of rows for a person: ' (40 rows: 30 messages, 10 text)'. Nothing for plain text."""
    counts = ", ".join(f"{n:,} {form}" for form, n in rows.items())
    return f" ({sum(rows.values()):,} rows: {counts})" if rows else ""


def rendered(said: Said, tokenizer: Any, where: str, form: str = "messages") -> str:
    """Messages in the model's chat template."""
    if tokenizer is None or not tokenizer.chat_template:
        raise UserError(f"{where} is of the form {form!r} and the model has no chat template",
                        'give plain {"text": "..."} instead')
    return render(tokenizer, said, where)


def whole(text: str) -> tuple[str, int]:
    """The text with U+FFFD in place of each lone surrogate, which no tokenizer can read; and their number."""
    return SURROGATE.subn("\ufffd", text)


def conversation(row: Any, where: str) -> tuple[str, str | Said]:
    """(form, a text or messages) of a row. Raises UserError if it has no known form."""
    if isinstance(row, str):
        return "text", row
    if isinstance(row, list) and row and all(isinstance(m, dict) and "role" in m for m in row):
        return "messages", row
    if isinstance(row, dict):
        if isinstance(row.get("text"), str):
            return "text", row["text"]
        for form, read in READERS.items():
            if form in row and (said := read(row, where)) is not None:
                return NAMES.get(form, form), said
    keys = f"the keys {', '.join(map(repr, list(row)[:8]))}" if isinstance(row, dict) and row else type(row).__name__
    raise UserError(f"{where} has no form that llmc reads ({keys})", FORMS)


def _messages(row: dict[str, Any], where: str) -> Said | None:
    return row["messages"] if isinstance(row["messages"], list) else None


def _sharegpt(row: dict[str, Any], where: str) -> Said | None:
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns or not all(isinstance(t, dict) for t in turns):
        return None
    if all("role" in t for t in turns):
        return _system(row) + turns
    made = _system(row)
    for turn in turns:
        role = ROLES.get(str(turn.get("from")).lower())
        if role is None:
            raise UserError(f"{where}: a turn of the conversation is from {turn.get('from')!r}", f"use {', '.join(ROLES)}")
        if not isinstance(turn.get("value"), str):
            raise UserError(f"{where}: a turn of the conversation has no text in `value`", FORMS)
        made.append({"role": role, "content": turn["value"]})
    return made


def _instruction(row: dict[str, Any], where: str) -> Said | None:
    question, more = row["instruction"], row.get("input") or row.get("context") or ""
    answer = row.get("output", row.get("response"))
    if not all(isinstance(x, str) for x in (question, more, answer)):
        return None
    return _system(row) + _asked(f"{question}\n\n{more}" if more else question, str(answer))


def _prompt(row: dict[str, Any], where: str) -> Said | None:
    return _joined(row, row.get("completion", row.get("response")))


def _preference(row: dict[str, Any], where: str) -> str | Said | None:
    chosen = row["chosen"]
    if isinstance(chosen, str) and "prompt" not in row:
        return chosen  # the whole conversation as text
    if isinstance(chosen, list) and any(isinstance(m, dict) and m.get("role") == "user" for m in chosen):
        return chosen
    return _joined(row, chosen)


def _joined(row: dict[str, Any], answer: Any) -> Said | None:
    """A prompt with its answer, each a text or messages."""
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        prompt = _asked(prompt)
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    return _system(row) + prompt + answer if isinstance(prompt, list) and isinstance(answer, list) and answer else None


def _asked(question: str, *answers: str) -> Said:
    return [{"role": "user", "content": question}, *({"role": "assistant", "content": a} for a in answers)]


def _system(row: dict[str, Any]) -> Said:
    given = row.get("system")
    return [{"role": "system", "content": given}] if isinstance(given, str) and given else []


READERS = {"messages": _messages, "conversations": _sharegpt, "chosen": _preference, "instruction": _instruction,
           "prompt": _prompt}
NAMES = {"chosen": "preference"}
