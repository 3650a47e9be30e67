"""Finds the llama.cpp pre-tokenizer that splits text like a tokenizer.json.

llama.cpp has pre-tokenizers by name (src/llama-vocab.cpp). A tokenizer.json lists the steps of its own. The steps are
reduced to a signature, and TABLE gives the name for it. If several names mean the same splitting, TABLE has the one
without other effects. The export then checks the name: it tokenizes the same text with both.
"""

from __future__ import annotations

from typing import Any

from llmc.errors import UserError

Signature = tuple[str, ...]

ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
SLASHED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
CL100K = rf"{ENDINGS}|{LETTERS}|\p{{N}}{{1,3}}|{SYMBOLS}|{SPACES}"
QWEN = rf"{ENDINGS}|{LETTERS}|\p{{N}}|{SYMBOLS}|{SPACES}"
QWEN35 = (rf"{ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{SPACES}")
TEKKEN = rf"{CASED[0]}|{CASED[1]}|\p{{N}}|{SLASHED}|{SPACES}"
O200K = rf"{CASED[0]}{ENDINGS}?|{CASED[1]}{ENDINGS}?|\p{{N}}{{1,3}}|{SLASHED}|{SPACES}"
DEEPSEEK3 = (r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
             r"| ?[\p{P}\p{S}]+[\r\n]*|" + SPACES)

# signature -> (name, name if `ignore_merges` is set: a word of the vocabulary is one token)
TABLE: dict[Signature, tuple[str | None, str | None]] = {
    ("words",): ("gpt-2", None),
    ("digit", "words"): ("smollm", None),
    (CL100K, "bytes"): ("dbrx", "llama-bpe"),
    (QWEN, "bytes"): ("qwen2", None),
    (QWEN35, "bytes"): ("qwen35", None),
    (TEKKEN, "bytes"): ("tekken", "tekken"),  # llama.cpp ignores merges in both cases; the check decides
    (O200K, "bytes"): ("gpt-4o", None),
    (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", "digit", "bytes"): ("deepseek-coder", None),
    (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK3, "bytes"): ("deepseek-v3", None),
}

# llama.cpp's regular expressions for these names exclude combining marks from words. The value is a name with nearly the
# same splitting that includes the marks (None: there is none). Only newer versions of llama.cpp know it
WITHOUT_MARKS = {"gpt-4o": "granite-embed-multi-97m", "tekken": None}


def _steps(node: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer or normalizer as a flat list."""
    if node is None:
        return []
    if node["type"] == "Sequence":
        inner = node.get("pretokenizers") or node.get("normalizers") or []
        return [step for n in inner for step in _steps(n)]
    return [node]


def signature(pre_tokenizer: dict[str, Any] | None) -> Signature:
    """The steps as a key of TABLE. A step that TABLE does not use is written out in full."""
    return tuple(_step_key(step) for step in _steps(pre_tokenizer))


def _step_key(step: dict[str, Any]) -> str:
    kind = step["type"]
    if kind == "ByteLevel" and not step.get("add_prefix_space", True):
        return "words" if step.get("use_regex", True) else "bytes"
    if kind == "Digits" and step.get("individual_digits"):
        return "digit"
    if kind == "Split" and (step["behavior"], bool(step.get("invert"))) in (("Isolated", False), ("Removed", True)):
        pattern: str = step["pattern"].get("Regex") or step["pattern"].get("String")
        # some files hold the control characters themselves
        pattern = pattern.replace("\r", r"\r").replace("\n", r"\n")
        return pattern.replace("'(?i:[sdmt]|ll|ve|re)", ENDINGS)
    return f"{kind} {({k: v for k, v in step.items() if k != 'type'})}"


def known_pre(pre_tokenizer: dict[str, Any] | None, ignore_merges: bool) -> str | None:
    """llama.cpp's name for the pre-tokenizer of a byte-level BPE, None if TABLE has none."""
    return TABLE.get(signature(pre_tokenizer), (None, None))[int(ignore_merges)]


def find_pre(pre_tokenizer: dict[str, Any] | None, ignore_merges: bool) -> str:
    """Like known_pre, but raises UserError that lists the steps if TABLE has no name for them."""
    name = known_pre(pre_tokenizer, ignore_merges)
    if name is None:
        steps = " then ".join(signature(pre_tokenizer)) or "none"
        raise UserError(
            "llmc knows no llama.cpp pre-tokenizer that splits like this tokenizer.json: "
            f"{steps}{' (with ignore_merges)' if ignore_merges else ''}",
            "if you know llama.cpp's name for it, give it with --pre NAME: the export still checks the file")
    return name


def adds_leading_space(normalizer: dict[str, Any] | None, pre_tokenizer: dict[str, Any] | None) -> bool:
    """Whether a SentencePiece-style tokenizer puts a space before the text. UserError for a step that llama.cpp lacks."""
    leading = False
    for step in _steps(normalizer) + _steps(pre_tokenizer):
        kind = step["type"]
        if kind == "Prepend" and step["prepend"] == "▁":
            leading = True
        elif kind == "Metaspace" and step.get("replacement", "▁") == "▁":
            scheme = step.get("prepend_scheme") or ("always" if step.get("add_prefix_space", True) else "never")
            leading = leading or scheme != "never"
        elif kind == "Replace" and step["pattern"] == {"String": " "} and step["content"] == "▁":
            continue
        elif kind == "Split" and step["pattern"] == {"String": " "}:
            continue  # Gemma's; an earlier step has replaced the spaces
        else:
            raise UserError(f"llama.cpp's SentencePiece tokenizer has no step like {step}",
                            "this tokenizer cannot be stored in a GGUF file")
    return leading


def normalizers(normalizer: dict[str, Any] | None) -> list[str]:
    """The types of a normalizer's steps."""
    return [step["type"] for step in _steps(normalizer)]
