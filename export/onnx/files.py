"""The files beside model.onnx: tokenizer files byte for byte, the chosen chat template, and genai_config.json."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from llmc.console import warn
from llmc.errors import UserError
from llmc.files import read_json
from llmc.formats.chat_template import DEFAULT, JINJA, NAMED, PROCESSOR, Template, by_name, chat_template_of
from llmc.formats.checkpoint import CARD_FILES
from llmc.formats.config_json import read_checked, read_generation
from llmc.formats.genai_config import QDQ_LEVEL
from llmc.formats.onnx_folder import GENAI
from llmc.formats.tokenizer_files import copy_tokenizer_files

CONFIG = "tokenizer_config.json"


def copy_tokenizer(folder: Path, work: Path, tokenizer: Any, choice: str) -> Template | None:
    """Copy the tokenizer's files and the card; return the chat templates that the folder `work` has."""
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} has no tokenizer.json, which onnxruntime-genai reads",
                        "save the tokenizer again with transformers (AutoTokenizer.from_pretrained, then save_pretrained)")
    template = chat_template_of(folder, tokenizer, choice)
    for name in (*CARD_FILES, "generation_config.json"):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, work / name)
    in_config = read_json(folder / CONFIG).get("chat_template")
    files = (folder / JINJA).is_file() or (folder / NAMED).is_dir()
    if choice == "keep" and (template is None or isinstance(in_config, str) or (in_config is None and files)):
        copy_tokenizer_files(folder, work)
    else:
        copy_tokenizer_files(folder, work, without=(JINJA, PROCESSOR, NAMED))
        _write_templates(work, by_name(template), in_config is not None)
    return template


def _write_templates(work: Path, named: dict[str, str], in_config: bool) -> None:
    """Write each template into its own file. A template of tokenizer_config.json can only be a text for onnxruntime-genai:
    there the default takes the place of a list."""
    if in_config:
        values = read_json(work / CONFIG)
        del values["chat_template"]
        if len(named) > 1 and DEFAULT in named:
            values["chat_template"] = named[DEFAULT]
        (work / CONFIG).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, text in named.items():
        if name == DEFAULT:
            path = work / JINJA
        else:
            path = work / NAMED / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}.jinja"
            path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="")


def end_ids(folder: Path, tokenizer: Any, rows: int) -> list[int]:
    """Every id that ends a generation, from all files that name one; that of the tokenizer comes first. An id beyond the
    `rows` of the embedding is left out, with a warning: onnxruntime-genai refuses it."""
    found: list[int] = []
    files = (read_checked(folder / "config.json"), read_generation(folder))
    for value in [tokenizer.eos_token_id, *(values.get("eos_token_id") for values in files)]:
        found += [i for i in (value if isinstance(value, list) else [value]) if i is not None and i not in found]
    if beyond := [i for i in found if not 0 <= i < rows]:
        warn(f"eos_token_id {beyond[0]} of {folder} is not in its vocabulary of {rows:,} tokens and is left out")
    found = [i for i in found if i not in beyond]
    if not found:
        raise UserError(f"{folder} names no token that ends a generation", "set eos_token_id in generation_config.json")
    return found


def finish_genai(work: Path, ends: list[int], qdq_level: int | None) -> None:
    """Complete the builder's genai_config.json: every end token, and with --int4 qdq the session's accuracy level."""
    path = work / GENAI
    values = read_json(path)
    values["model"]["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    if qdq_level is not None:
        values["model"]["decoder"]["session_options"][QDQ_LEVEL] = str(qdq_level)
    path.write_text(json.dumps(values, indent=4) + "\n", encoding="utf-8")
