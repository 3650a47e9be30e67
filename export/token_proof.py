"""The comparison of token ids around special tokens: rendered chats, and every added token beside words, spaces and itself.

A runtime may look for added tokens in another way than the model's tokenizer. In a chat prompt this is an error. In other
texts it is a warning, because many models have tokens that no runtime treats exactly as the tokenizer does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from llmc.console import warn
from llmc.errors import UserError
from llmc.export.parity import first_difference, show
from llmc.formats.chat_template import Template, by_name, render
from llmc.formats.check_text import CHAT, around

Ids = Callable[[str], list[int]]
FLAGS = ("single_word", "lstrip", "rstrip")
NAMED, LISTED = 3, 100  # the most tokens of a kind in a warning and in a report


@dataclass
class Side:
    """A runtime that is compared. expected: the model's ids of a text. found: the runtime's."""

    name: str
    expected: Ids
    found: Ids
    hint: str


@dataclass
class Unlike:
    """Added tokens of one kind around which the runtime gives other ids. example: what it does with one text."""

    example: str
    tokens: list[str] = field(default_factory=list)


def chats(side: Side, tokenizer: Any, template: Template | None) -> dict[str, int | None]:
    """Compare a rendered chat of each template. Returns the number of ids for each name; None if it could not be rendered.

    Raises UserError if ids differ."""
    counts: dict[str, int | None] = {}
    for name, text in by_name(template).items():
        prompt = _prompt(tokenizer, text)
        counts[name] = None
        if prompt is None:
            warn(f"the chat template {name!r} could not be rendered for a plain chat: its token ids were not compared")
            continue
        expected, found = side.expected(prompt), side.found(prompt)
        if at := first_difference(expected, found):
            raise UserError(f"{side.name} gives other token ids for a prompt of the chat template {name!r} than the model's "
                            f"tokenizer: {show(at[0], expected, found, tokenizer)}", side.hint)
        counts[name] = len(expected)
    return counts


def _prompt(tokenizer: Any, template: str) -> str | None:
    """The rendered chat, with a system message if the template allows one; None if it renders neither."""
    for messages in (CHAT, CHAT[1:]):
        try:
            return render(tokenizer, messages, "the check", chat_template=template, add_generation_prompt=True)
        except UserError:
            continue
    return None


def added(side: Side, tokenizer: Any, spec: dict[str, Any], tokens: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare texts around added tokens. Warns of differences, and returns how many there are of each kind.

    spec: the contents of tokenizer.json. tokens: those of its added tokens that the runtime knows, as texts hold them."""
    first = _scheme(spec) == "first"
    unlike: dict[str, Unlike] = {}
    for token in tokens:
        if (example := _example(side, token["content"], tokenizer)) is not None:
            flags = [flag for flag in FLAGS if token.get(flag)]
            kind = flags[0] if flags else "prepend_scheme 'first'" if first else "text beside it"
            unlike.setdefault(kind, Unlike(example)).tokens.append(token["content"])
    for kind, found in unlike.items():
        more = len(found.tokens) - NAMED
        names = ", ".join(map(repr, found.tokens[:NAMED])) + (f" and {more} more" if more > 0 else "")
        warn(f"{side.name} gives other token ids around {names} than the model's tokenizer ({kind}): {found.example}")
    return {"compared": len(tokens), "unlike": {kind: len(found.tokens) for kind, found in unlike.items()},
            "tokens": {kind: found.tokens[:LISTED] for kind, found in unlike.items()}}


def _scheme(spec: dict[str, Any]) -> str | None:
    steps = spec.get("pre_tokenizer") or {}
    for step in steps.get("pretokenizers", [steps]):
        if step.get("type") == "Metaspace":
            return str(step.get("prepend_scheme"))
    return None


def _example(side: Side, token: str, tokenizer: Any) -> str | None:
    """What the runtime does otherwise around a token; None if nothing. All texts are compared at once, then one by one."""
    texts = around(token)
    whole = "\n".join(texts)
    if side.expected(whole) == side.found(whole):
        return None
    for text in (*texts, whole):
        expected, found = side.expected(text), side.found(text)
        if at := first_difference(expected, found):
            return f"in {text!r}, {show(at[0], expected, found, tokenizer)}"
    return None
