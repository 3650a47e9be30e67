"""What llama.cpp takes for granted in a .gguf file, and what makes it abort if it is not so. Also the parts of a split
file."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmc.errors import UserError
from llmc.formats.gguf_header import STRING, Array, Header, read_header

PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
LAYER = re.compile(r"blk\.(\d+)\.")
MERGE = "merge its parts with `llama-gguf-split --merge FIRST_PART OUT.gguf`"
FLOAT32, INTEGERS32 = 6, (4, 5)
NO_TOKENIZER = (None, "none", "no_vocab")
MOST = {"block_count": 4096, "embedding_length": 1 << 20, "context_length": 1 << 31, "attention.head_count": 4096}


def check_runnable(file: Path) -> None:
    """Raise UserError for a file at which llama.cpp may abort. Only the header is read."""
    for part in parts(file):
        header = read_header(part)
        if found := next(faults(header) if part == file else odd_numbers(header), None):
            raise UserError(f"{part}: {found}", "download or export it again: llama.cpp cannot run this file")


def has_tokenizer(header: Header) -> bool:
    return header.fields.get("tokenizer.ggml.model") not in NO_TOKENIZER


def parts(file: Path) -> list[Path]:
    """The files of a split GGUF file, of which `file` is the first; of any other file, the file alone.

    Raises UserError for a part that is not the first, and for parts that are missing or do not belong together.
    """
    header = read_header(file)
    count = header.fields.get("split.count", 0)
    if not isinstance(count, int) or count <= 1:
        return [file]
    number, match = header.fields.get("split.no"), PART.fullmatch(file.name)
    if match is None or int(match["count"]) != count or int(match["number"]) != (number or 0) + 1:
        raise UserError(f"{file} is part {(number or 0) + 1} of {count} of a split file, and its name must end in "
                        f"-{(number or 0) + 1:05}-of-{count:05}.gguf", f"give it back its name, or {MERGE}")
    found = [file.with_name(f"{match['stem']}-{n + 1:05}-of-{count:05}.gguf") for n in range(count)]
    if number:
        raise UserError(f"{file} is part {number + 1} of {count}: its metadata are in the first part",
                        f"give {found[0].name}, or {MERGE}")
    if missing := [p.name for p in found if not p.is_file()]:
        raise UserError(f"{file} is the first of {count} parts, and {len(missing)} are missing: {', '.join(missing[:5])}",
                        "download all parts into one folder")
    tensors = sum(len(read_header(p).tensors) for p in found)
    if header.fields.get("split.tensors.count", tensors) != tensors:
        raise UserError(f"the {count} parts of {file} hold {tensors} tensors, and should hold "
                        f"{header.fields['split.tensors.count']}", "download all parts again: they do not belong together")
    return found


def faults(header: Header) -> Iterator[str]:
    """What is wrong with a model file, one line each."""
    fields = header.fields
    arch = fields.get("general.architecture")
    if not isinstance(arch, str) or not arch:
        yield f"general.architecture is {arch!r}, not the name of an architecture"
        return
    yield from odd_numbers(header)
    for key in MOST:
        value = fields.get(f"{arch}.{key}")
        values = value.values if isinstance(value, Array) else () if value is None else (value,)
        if any(isinstance(v, bool) or not isinstance(v, int) or not 0 <= v <= MOST[key] for v in values):
            yield f"{arch}.{key} is {value!r}, not a whole number up to {MOST[key]:,}"
    layers = {int(m[1]) for t in header.tensors if (m := LAYER.match(t.name))}
    blocks = fields.get(f"{arch}.block_count")
    whole = not fields.get("split.count")
    if whole and layers and isinstance(blocks, int) and not len(layers) == max(layers) + 1 == blocks:
        yield f"{arch}.block_count is {blocks}, and the file has {len(layers)} layers, {min(layers)} to {max(layers)}"
    embedding = next((t for t in header.tensors if t.name == "token_embd.weight"), None)
    hidden = fields.get(f"{arch}.embedding_length")
    if embedding and len(embedding.shape) != 2:
        yield f"token_embd.weight has {len(embedding.shape)} dimensions, not 2"
        return
    if embedding and isinstance(hidden, int) and embedding.shape[0] != hidden:
        yield f"{arch}.embedding_length is {hidden}, and token_embd.weight has rows of {embedding.shape[0]}"
    yield from _tokenizer_faults(fields, embedding.shape[1] if embedding else None)


def odd_numbers(header: Header) -> Iterator[str]:
    """Metadata that are not finite or, for an epsilon, not small and positive."""
    for key, value in header.fields.items():
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{key} is {value}"
        elif key.endswith("epsilon") and not (isinstance(value, float) and 0 <= value < 1):
            yield f"{key} is {value!r}, not a small number"


def _tokenizer_faults(fields: dict[str, Any], rows: int | None) -> Iterator[str]:
    """rows: of the embedding."""
    if fields.get("tokenizer.ggml.model") in NO_TOKENIZER:
        return
    tokens = fields.get("tokenizer.ggml.tokens")
    if not (isinstance(tokens, Array) and tokens.kind == STRING and tokens.count):
        yield "tokenizer.ggml.tokens is not a list of texts"
        return
    if rows is not None and rows != tokens.count:
        yield f"the tokenizer has {tokens.count:,} tokens and the embedding {rows:,} rows"
    for key, kinds, what in (("scores", (FLOAT32,), "float32"), ("token_type", INTEGERS32, "32-bit integers")):
        found = fields.get(f"tokenizer.ggml.{key}")
        if found is not None and not (isinstance(found, Array) and found.kind in kinds and found.count == tokens.count):
            yield f"tokenizer.ggml.{key} is not a list of {tokens.count:,} numbers ({what}), one for each token"
    merges = fields.get("tokenizer.ggml.merges")
    if merges is not None and not (isinstance(merges, Array) and merges.kind == STRING):
        yield "tokenizer.ggml.merges is not a list of texts"
    for key, value in fields.items():
        number = key.startswith("tokenizer.ggml.") and key.endswith("_token_id")
        # llama.cpp ignores the largest number: converters write it for "none"
        if number and not (isinstance(value, int) and (0 <= value < tokens.count or value in (-1, 0xFFFFFFFF))):
            yield f"{key} is {value!r}, and there are {tokens.count:,} tokens"
