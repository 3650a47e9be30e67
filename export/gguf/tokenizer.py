"""The tokenizer of a model folder as GGUF metadata.

llama.cpp's model families use two kinds: byte-level BPE (`gpt2`) and SentencePiece-like BPE with byte fallback (`llama`).
Both are read from tokenizer.json. If a folder has none, transformers builds it from the other files.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from llmc.errors import UserError
from llmc.files import read_json
from llmc.formats import pretokenizers
from llmc.formats.chat_template import DEFAULT, Template, by_name, chat_template_of
from llmc.formats.config_json import read_checked, read_generation
from llmc.formats.text_ends import note_of_eos

# Texts that llama.cpp recognizes as end tokens without metadata (src/llama-vocab.cpp, "eog")
ENDS_BY_TEXT = {
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "</s>",
    "<|eom_id|>", "<EOT>", "[EOT]", "<|end_of_text|>", "<end_of_utterance>", "<eos>",
}
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
KEY_NAMES = {"unk": "unknown", "pad": "padding"}
NO_WAY = "llmc cannot write this tokenizer into GGUF"
NEVER = -1e9  # score of a token that no merge produces


@dataclass
class Vocabulary:
    """The vocabulary of the file: one token for each row of the embedding."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    space_prefix: bool | None = None
    strips_right: bool = False
    """Special tokens remove the spaces after them."""
    add_bos: bool = False
    add_eos: bool = False
    special_ids: dict[str, int] = field(default_factory=dict)
    ends: list[int] = field(default_factory=list)
    """Every id that ends a generation; that of the tokenizer comes first."""
    template: Template | None = None
    notes: list[str] = field(default_factory=list)


def read_vocabulary(folder: Path, tokenizer: Any, size: int, pre: str | None, chat_template: str) -> Vocabulary:
    """The vocabulary of `folder` for an embedding of `size` rows.

    tokenizer: the folder's tokenizer, opened by transformers. pre: llama.cpp's name of the pre-tokenizer, None to find it.
    """
    spec = tokenizer_spec(folder, tokenizer)
    model = spec["model"]
    if model.get("type", "BPE") != "BPE":
        raise UserError(f"the tokenizer of {folder} is of type {model['type']}; GGUF's causal models use BPE", NO_WAY)
    tokens, types, notes = _tokens(spec, size)
    if _is_byte_level(spec):
        normalizers = pretokenizers.normalizers(spec.get("normalizer"))
        if strange := [kind for kind in normalizers if kind != "NFC"]:
            raise UserError(f"the tokenizer of {folder} normalizes text with {', '.join(strange)}, which llama.cpp "
                            "does not do", NO_WAY)
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        pre = pre or pretokenizers.find_pre(spec.get("pre_tokenizer"), bool(model.get("ignore_merges")))
        v = Vocabulary("gpt2", pre, tokens, types, merges=merges)
        if normalizers:  # nearly all text is composed already, and NFC does not change it
            notes.append("the tokenizer composes Unicode (NFC) and llama.cpp does not: tokens of decomposed text differ")
    else:
        v = _sentencepiece(folder, spec, tokens, types)
    v.notes = notes
    _check_distinct(folder, v.tokens)
    complete(v, folder, tokenizer, chat_template)
    return v


def complete(v: Vocabulary, folder: Path, tokenizer: Any, chat_template: str) -> None:
    """Add the special ids, the tokens around a text and the chat template to the vocabulary."""
    added = tokenizer_spec(folder, tokenizer).get("added_tokens", [])
    v.strips_right = any(a["special"] and a.get("rstrip") for a in added)
    _add_affixes(v, tokenizer)
    v.notes += note_of_eos(tokenizer)
    _add_special_ids(v, folder, tokenizer)
    v.template = chat_template_of(folder, tokenizer, chat_template)


def tokenizer_spec(folder: Path, tokenizer: Any) -> dict[str, Any]:
    """The contents of the folder's tokenizer.json; if it has none, those that transformers builds from the other files."""
    path = folder / "tokenizer.json"
    if path.is_file():
        return read_json(path)
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise UserError(f"{folder} has no tokenizer.json and transformers cannot make one", "add the tokenizer.json")
    spec: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return spec


def _is_byte_level(spec: dict[str, Any]) -> bool:
    return any(_mentions(spec.get(part), "ByteLevel") for part in ("pre_tokenizer", "decoder"))


def _mentions(node: Any, kind: str) -> bool:
    if isinstance(node, dict):
        return node.get("type") == kind or any(_mentions(v, kind) for v in node.values())
    return isinstance(node, list) and any(_mentions(v, kind) for v in node)


def _tokens(spec: dict[str, Any], size: int) -> tuple[list[str], list[int], list[str]]:
    """The text and type of each of `size` ids, and notes. Ids without a token become unused tokens."""
    notes = []
    text_of = {i: t for t, i in spec["model"]["vocab"].items()}
    added = {a["id"]: a for a in spec.get("added_tokens", [])}
    text_of.update({i: a["content"] for i, a in added.items()})
    beyond = sorted(i for i in text_of if i >= size)
    if any(i not in added for i in beyond):
        raise UserError(f"the tokenizer has the id {beyond[-1]} and the embedding only {size} rows",
                        "tokenizer and weights do not match: download both again")
    if beyond:
        notes.append(f"{len(beyond)} added tokens beyond the embedding's {size} rows were left out "
                     f"(first {text_of[beyond[0]]!r})")
    tokens, types = [], []
    unknown = spec["model"].get("unk_token")
    for i in range(size):
        text = text_of.get(i)
        if text is None:
            tokens.append(f"[PAD{i}]")
            types.append(TokenType.UNUSED)
        elif text == unknown:
            tokens.append(text)
            types.append(TokenType.UNKNOWN)
        elif i in added:
            special = bool(added[i]["special"])
            # llama.cpp looks for these in the text before it turns spaces into ▁
            tokens.append(text if special or _is_byte_level(spec) else text.replace("▁", " "))
            types.append(TokenType.CONTROL if special else TokenType.USER_DEFINED)
        else:
            tokens.append(text)
            types.append(TokenType.NORMAL)
    return tokens, [int(t) for t in types], notes


def _sentencepiece(folder: Path, spec: dict[str, Any], tokens: list[str], types: list[int]) -> Vocabulary:
    """The vocabulary of a BPE with byte fallback. llama.cpp merges by a token's score, tokenizers by a pair's rank.

    A token's score is minus the rank of the first merge that produces it. This gives the same order of merges: all pairs that
    produce one token are adjacent in the list, because the list was made from the tokens in the order of their scores.
    """
    model = spec["model"]
    if not model.get("byte_fallback"):
        raise UserError(f"the tokenizer of {folder} is a BPE that is neither byte-level nor has byte fallback", NO_WAY)
    for i, text in enumerate(tokens):
        if BYTE_TOKEN.fullmatch(text):
            types[i] = int(TokenType.BYTE)
    if (n := sum(t == TokenType.BYTE for t in types)) != 256:
        raise UserError(f"the tokenizer of {folder} has {n} of the 256 byte tokens <0x00> to <0xFF>, and llama.cpp needs "
                        "all", NO_WAY)
    rank: dict[str, int] = {}
    for i, merge in enumerate(model["merges"]):
        rank.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), i)
    scores = [float(-rank[t]) if t in rank else NEVER for t in tokens]
    return Vocabulary("llama", "default", tokens, types, scores=scores,
                      space_prefix=pretokenizers.adds_leading_space(spec.get("normalizer"), spec.get("pre_tokenizer")))


def _check_distinct(folder: Path, tokens: list[str]) -> None:
    """Raise UserError if two tokens have the same text: llama.cpp would abort the whole process."""
    text, n = Counter(tokens).most_common(1)[0]
    if n > 1:
        raise UserError(f"{n} tokens of {folder} have the text {text!r}, and llama.cpp needs distinct ones",
                        "correct the added tokens in tokenizer.json")


def _add_affixes(v: Vocabulary, tokenizer: Any) -> None:
    """Find the tokens that the tokenizer puts before and after a text, by running it."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    at = next((i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare), None)
    before, after = (whole[:at], whole[at + len(bare) :]) if at is not None else (whole, [])
    if at is None or len(before) > 1 or len(after) > 1:
        raise UserError(f"the tokenizer turns 'a' into {whole}, and into {bare} without special tokens; GGUF can only add "
                        "one token before and one after", NO_WAY)
    v.add_bos, v.add_eos = bool(before), bool(after)
    if before:
        v.special_ids["bos"] = before[0]
    if after:
        v.special_ids["eos"] = after[0]


def _add_special_ids(v: Vocabulary, folder: Path, tokenizer: Any) -> None:
    """Add the BOS, EOS, padding and unknown ids and every id that ends a generation, from all files that name one."""
    files = [read_checked(folder / "config.json"), read_generation(folder)]
    for name in ("bos", "eos", "unk", "pad"):
        for value in [getattr(tokenizer, f"{name}_token_id", None), *(f.get(f"{name}_token_id") for f in files)]:
            for i in value if isinstance(value, list) else [value]:
                if i is None:
                    continue
                if not 0 <= i < len(v.tokens):
                    v.notes.append(f"{name}_token_id {i} is not in this vocabulary and was left out")
                    continue
                v.special_ids.setdefault(name, i)
                if name == "eos" and i not in v.ends:
                    v.ends.append(i)
    if "eos" in v.special_ids and v.special_ids["eos"] not in v.ends:
        v.ends.insert(0, v.special_ids["eos"])
    # llama.cpp ends at EOS, EOT, EOM and at tokens in ENDS_BY_TEXT: the keys go to the others first
    others = [i for i in v.ends if i != v.special_ids.get("eos")]
    others.sort(key=lambda i: v.tokens[i] in ENDS_BY_TEXT)
    if sum(v.tokens[i] not in ENDS_BY_TEXT for i in others) > 2:
        raise UserError(f"{len(v.ends)} tokens end a generation: {', '.join(repr(v.tokens[i]) for i in v.ends)}; GGUF "
                        "can store three beside those that llama.cpp knows by text",
                        "leave some out of eos_token_id in generation_config.json")
    v.special_ids.update(zip(("eot", "eom"), others, strict=False))


def add_vocabulary(writer: GGUFWriter, v: Vocabulary) -> None:
    """Write the vocabulary as metadata."""
    writer.add_tokenizer_model(v.model)
    writer.add_tokenizer_pre(v.pre)
    writer.add_token_list(v.tokens)
    writer.add_token_types(v.types)
    if v.scores is not None:
        writer.add_token_scores(v.scores)
    if v.merges is not None:
        writer.add_token_merges(v.merges)
    if v.space_prefix is not None:
        writer.add_add_space_prefix(v.space_prefix)
    add_behaviour(writer, v)


def add_behaviour(writer: GGUFWriter, v: Vocabulary, present: Collection[str] = ()) -> None:
    """Write the special ids, the tokens around a text and the chat template. present: keys that the file already has."""
    for name, i in v.special_ids.items():
        key = f"tokenizer.ggml.{KEY_NAMES.get(name, name)}_token_id"
        if key not in present:
            writer.add_uint32(key, i)
    writer.add_add_bos_token(v.add_bos)
    writer.add_add_eos_token(v.add_eos)
    named = by_name(v.template)
    keys = {name: re.sub("[^A-Za-z0-9]", "_", name) for name in named if name != DEFAULT}
    if len(set(keys.values())) < len(keys):
        raise UserError(f"the chat templates {', '.join(keys)} have the same names in GGUF, which knows letters and digits",
                        "rename one, or leave the templates out with --chat-template drop")
    for name, key in keys.items():
        writer.add_string(f"tokenizer.chat_template.{key}", named[name])
    if keys:
        writer.add_array("tokenizer.chat_templates", sorted(keys.values()))
    if DEFAULT in named:
        writer.add_string("tokenizer.chat_template", named[DEFAULT])
