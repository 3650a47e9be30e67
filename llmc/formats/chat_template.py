"""The chat templates of a model folder. Exporters and model folders carry all of them."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from llmc.console import warn
from llmc.errors import UserError
from llmc.files import read_json
from llmc.formats.template_limits import render_within_limits

SUSPICIOUS = re.compile(r"__\w+__|\|\s*attr\b|\b(import|eval|exec|popen|subprocess)\s*\(")
DEFAULT = "default"
JINJA, PROCESSOR = "chat_template.jinja", "chat_template.json"
NAMED = "additional_chat_templates"  # a folder with NAME.jinja for each template beside the default

Template = str | list[dict[str, str]]  # one, or several by name: [{"name": "default", "template": "..."}, ...]


def chat_template_of(folder: Path, tokenizer: Any, choice: str) -> Template | None:
    """'keep' the model's templates, 'drop' them, or read another one from a file."""
    if choice == "drop":
        return None
    template: Any = getattr(tokenizer, "chat_template", None)
    if choice != "keep":
        try:
            template = Path(choice).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"--chat-template {choice} is not a text file that can be read: {e}",
                            "give keep, drop or the path of a Jinja file") from e
    template = in_one_form(template, folder)
    if found := SUSPICIOUS.search(json.dumps(template)):
        warn(f"the chat template of {folder} holds {found[0]!r}, which a template does not need: read it before you "
             "run it (--chat-template drop leaves it out)")
    return template


def in_one_form(template: Any, where: Path) -> Template | None:
    """A template as transformers or a file has it: a text, {name: text} or [{'name', 'template'}, ...]."""
    if isinstance(template, list):
        template = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
    if isinstance(template, dict):
        if not all(isinstance(x, str) for pair in template.items() for x in pair):
            raise UserError(f"{where} has chat templates that are not texts with names",
                            'write chat_template as a text or as [{"name": "default", "template": "..."}]')
        if set(template) != {DEFAULT}:
            return [{"name": name, "template": text} for name, text in sorted(template.items())] or None
        template = template[DEFAULT]
    if template is not None and not isinstance(template, str):
        raise UserError(f"{where} has a chat template of type {type(template).__name__}", "write it as a text")
    return template or None


def by_name(template: Template | None) -> dict[str, str]:
    """{name: text}. A single template is the default."""
    if template is None:
        return {}
    return {DEFAULT: template} if isinstance(template, str) else {t["name"]: t["template"] for t in template}


def set_templates(tokenizer: Any, template: Template | None) -> None:
    """Give a tokenizer of transformers these chat templates, in the form in which it saves them."""
    named = by_name(template)
    tokenizer.chat_template = (named if set(named) != {DEFAULT} else named[DEFAULT]) or None


def template_in(folder: Path) -> Template | None:
    """The chat templates in the files of a folder, as transformers finds them: .jinja files come before the config.
    chat_template.json, which belongs to a processor, counts where there is nothing else."""
    files = {path.stem: path for path in sorted((folder / NAMED).glob("*.jinja"))}
    if (folder / JINJA).is_file():
        files[DEFAULT] = folder / JINJA
    try:
        found: Any = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    except UnicodeDecodeError as e:
        raise UserError(f"a chat template of {folder} is not UTF-8 text: {e}", "download it again") from e
    found = found or read_json(folder / "tokenizer_config.json").get("chat_template")
    return in_one_form(found or of_processor(folder), folder)


def of_processor(folder: Path) -> Any:
    """The template in chat_template.json, which transformers gives to a processor and not to its tokenizer."""
    return read_json(folder / PROCESSOR).get("chat_template")


def render(tokenizer: Any, messages: list[Any], where: str, **more: Any) -> str:
    """What a chat template makes of messages. transformers runs it in jinja2's sandbox.

    where: what an error names. more: options of transformers' apply_chat_template. Raises UserError if the template fails."""
    return render_within_limits(lambda: str(tokenizer.apply_chat_template(messages, tokenize=False, **more)),
                                len(str(messages)), where)


def hash_template(template: Template | None) -> str | None:
    """sha256 of a template, or of several with their names; None if there is none."""
    if template is None:
        return None
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
