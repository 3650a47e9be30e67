"""Which logits of student and teacher mean the same: heads may have rows that are no tokens, and not equally many."""

from __future__ import annotations

from typing import Any

from llmc.compress.skeleton import Skeleton
from llmc.errors import UserError
from llmc.formats.hf import load_tokenizer

# scripts, case, digits, code, white space, an emoji of several code points
SAMPLE = ("Zoë's 3 naïve cafés,\t12,345.67 €\n\n  if (x != 0) { y += 'a\\n'; }  "
          "Ελληνικά русский 中文字 हिन्दी 👩‍💻 \r\nTHE END   ")


def common_vocabulary(student: Skeleton, teacher: Skeleton) -> int:
    """How many of the first logits are compared: all where both heads are of one size, else those of the tokens.

    Raises a UserError where an id is not the same token to both, or a head lacks a token.
    """
    folders = [m.checkpoint.folder for m in (student, teacher)]
    ours, theirs = (load_tokenizer(f) for f in folders)
    mine, other = ours.get_vocab(), theirs.get_vocab()
    hint = "logits are compared: the student needs the teacher's tokenizer"
    if mine != other:
        differing = sorted({token for token, _ in mine.items() ^ other.items()})
        raise UserError(f"the tokenizers of {folders[0]} and {folders[1]} differ in {len(differing)} tokens, first "
                        f"{differing[0]!r}", hint)
    if _ids(ours) != _ids(theirs):
        raise UserError(f"the tokenizers of {folders[0]} and {folders[1]} cut the same text differently", hint)
    rows = [int(m.model.get_output_embeddings().weight.shape[0]) for m in (student, teacher)]
    tokens = max(mine.values()) + 1
    for folder, n in zip(folders, rows, strict=True):
        if n < tokens:
            raise UserError(f"the head of {folder} has {n} rows and its tokenizer {tokens} tokens", "the folder is damaged")
    return rows[0] if rows[0] == rows[1] else tokens


def _ids(tokenizer: Any) -> list[int]:
    found: list[int] = tokenizer(SAMPLE, add_special_tokens=False).input_ids
    return found
