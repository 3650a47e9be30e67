"""The logits of student and teacher that can be compared. Heads may have rows without a token."""

from __future__ import annotations

from typing import Any

from llmc.compress.skeleton import Skeleton
from llmc.errors import UserError
from llmc.formats.hf import load_tokenizer

# scripts, case, digits, code, white space, an emoji of several code points
SAMPLE = ("Zoë's 3 naïve cafés,\t12,345.67 €\n\n  if (x != 0) { y += 'a\\n'; }  "
          "Ελληνικά русский 中文字 हिन्दी 👩‍💻 \r\nTHE END   ")


def common_vocabulary(student: Skeleton, teacher: Skeleton) -> int:
    """The number of logits to compare (the first ones): all if both heads have the same size, else one for each token.

    UserError if the tokenizers differ, or if a head has fewer rows than there are tokens.
    """
    folders = [m.checkpoint.folder for m in (student, teacher)]
    of_student, of_teacher = (load_tokenizer(f) for f in folders)
    vocabulary, other = of_student.get_vocab(), of_teacher.get_vocab()
    hint = "logits are compared, so student and teacher need the same tokenizer"
    if vocabulary != other:
        differing = sorted({token for token, _ in vocabulary.items() ^ other.items()})
        raise UserError(f"the tokenizers of {folders[0]} and {folders[1]} differ in {len(differing)} tokens, first "
                        f"{differing[0]!r}", hint)
    if _ids(of_student) != _ids(of_teacher):
        raise UserError(f"the tokenizers of {folders[0]} and {folders[1]} tokenize the same text differently", hint)
    rows = [int(m.model.get_output_embeddings().weight.shape[0]) for m in (student, teacher)]
    tokens = max(vocabulary.values()) + 1
    for folder, n in zip(folders, rows, strict=True):
        if n < tokens:
            raise UserError(f"the head of {folder} has {n} rows and its tokenizer {tokens} tokens", "the folder is damaged")
    return rows[0] if rows[0] == rows[1] else tokens


def _ids(tokenizer: Any) -> list[int]:
    found: list[int] = tokenizer(SAMPLE, add_special_tokens=False).input_ids
    return found
