"""Evaluation texts: a file of the user, the help text of CPython, or WikiText-2 from the hub."""

from __future__ import annotations

import zipfile
from pathlib import Path

from llmc.errors import UserError
from llmc.formats.text_files import is_table
from llmc.formats.text_rows import read_documents

PYTHON_DOCS = "python-docs"
WIKITEXT = "wikitext"


def load_text(spec: str, folder: Path | None = None) -> tuple[str, str]:
    """Return (name, text). spec: a file path, 'python-docs' or 'wikitext'. Raises UserError if the text cannot be read.

    folder: with the tokenizer, whose chat template renders the conversations of a file."""
    if spec == PYTHON_DOCS:
        return spec, _python_docs()
    if spec == WIKITEXT:
        return spec, _wikitext()
    path = Path(spec).expanduser()
    tokenizer = None
    if folder is not None and is_table(path):
        from llmc.formats.hf import load_tokenizer

        tokenizer = load_tokenizer(folder)
    text = "\n\n".join(read_documents(path, tokenizer).texts)
    if not text.strip():
        raise UserError(f"{spec} is empty", "give a text of a few thousand words")
    return path.name, text


def _python_docs() -> str:
    """The topics of `help()`, sorted by name. They change with the version of Python, and so does text_sha256."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _wikitext() -> str:
    """wiki.test.raw of WikiText-2, from the archive that llama.cpp uses for its own perplexity results."""
    from huggingface_hub import errors, hf_hub_download

    try:
        archive = hf_hub_download("ggml-org/ci", "wikitext-2-raw-v1.zip", repo_type="dataset")
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, ConnectionError, TimeoutError) as e:
        raise UserError("the text `wikitext` is not in the cache and the Hugging Face hub cannot be reached",
                        f"use --text {PYTHON_DOCS}, or --text FILE with a wiki.test.raw of your own") from e
    with zipfile.ZipFile(archive) as z:
        return z.read("wikitext-2-raw/wiki.test.raw").decode("utf-8")
