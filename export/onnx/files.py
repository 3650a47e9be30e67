"""The files beside model.onnx: tokenizer files byte for byte, the chosen chat template, and genai_config.json."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from llmc.errors import UserError
from llmc.files import read_json
from llmc.formats.chat_template import chat_template_of
from llmc.formats.checkpoint import CARD_FILES, TOKENIZER_FILES
from llmc.formats.onnx_folder import GENAI, QDQ_LEVEL

TEMPLATES = ("chat_template.jinja", "chat_template.json")


def copy_tokenizer(folder: Path, work: Path, tokenizer: Any, choice: str) -> str | None:
    """Copy the tokenizer's files and the card; return the sha256 of the folder's chat template, None if it has none."""
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} has no tokenizer.json, which onnxruntime-genai reads",
                        "save the tokenizer again with transformers (AutoTokenizer.from_pretrained, then save_pretrained)")
    template = chat_template_of(folder, tokenizer, choice)
    for name in (*TOKENIZER_FILES, *CARD_FILES, "generation_config.json"):
        if (folder / name).is_file() and not (choice != "keep" and name in TEMPLATES):
            shutil.copyfile(folder / name, work / name)
    if choice != "keep":
        config = work / "tokenizer_config.json"
        values = read_json(config)
        if values.pop("chat_template", None) is not None:
            config.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if template is not None:
            (work / TEMPLATES[0]).write_text(str(template), encoding="utf-8")
    if template is None:
        return None
    text = template if isinstance(template, str) else json.dumps(template)
    return hashlib.sha256(text.encode()).hexdigest()


def end_ids(folder: Path, tokenizer: Any) -> list[int]:
    """Every id that ends a generation, from all files that name one; that of the tokenizer comes first."""
    found: list[int] = []
    for value in [tokenizer.eos_token_id, *(read_json(folder / n).get("eos_token_id")
                                            for n in ("config.json", "generation_config.json"))]:
        found += [i for i in (value if isinstance(value, list) else [value]) if i is not None and i not in found]
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
