"""The text of a generation, token by token: each token costs the same, however long the text is."""

from __future__ import annotations

from llmc.runtimes.base import Runtime

CONTEXT = 8  # tokens before the new ones that are decoded with them: some tokenizers drop the space before the first word


class Stream:
    """Turns token ids into pieces of text. prompt: the ids before the generated ones."""

    def __init__(self, runtime: Runtime, prompt: list[int]) -> None:
        self.runtime, self.ids = runtime, prompt[-CONTEXT:]
        self.shown = len(self.ids)  # so many ids are shown, the others wait

    def add(self, token: int) -> str:
        """The new text after one more token. It is empty while a character is incomplete (some tokens are part of one)."""
        self.ids.append(token)
        piece = self.waiting()
        if piece.endswith("\ufffd"):
            return ""
        self.ids = self.ids[-CONTEXT:]
        self.shown = len(self.ids)
        return piece

    def waiting(self) -> str:
        """The text that was not shown yet."""
        known = self.runtime.detokenize(self.ids[: self.shown])
        return self.runtime.detokenize(self.ids)[len(known):]
