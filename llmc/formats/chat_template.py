"""The chat template that an export copies from a model folder."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from llmc.console import warn
from llmc.errors import UserError

SUSPICIOUS = re.compile(r"__\w+__|\|\s*attr\b|\b(import|eval|exec|popen|subprocess)\s*\(")


def chat_template_of(folder: Path, tokenizer: Any, choice: str) -> str | list[dict[str, str]] | None:
    """The chat template to export, or None. It is copied as text and never run.

    choice: 'keep' the model's template, 'drop' it, or the path of a file with another.
    """
    if choice == "drop":
        return None
    template: Any = getattr(tokenizer, "chat_template", None)
    if choice != "keep":
        try:
            template = Path(choice).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"--chat-template {choice} is not a text file that can be read: {e}",
                            "give keep, drop or the path of a Jinja file") from e
    if not template:
        return None
    if isinstance(template, dict):
        template = [{"name": k, "template": t} for k, t in sorted(template.items())]
    if found := SUSPICIOUS.search(json.dumps(template)):
        warn(f"the chat template of {folder} holds {found[0]!r}, which a template does not need: read it before you "
             "run it (--chat-template drop leaves it out)")
    return template  # type: ignore[no-any-return]
