"""The proof in onnxruntime-genai: it opens the folder, gives the token ids of the model's tokenizer, and generates.

onnxruntime-genai reads tokenizer.json with a tokenizer of its own (onnxruntime-extensions). A file tokenizer_module.json
beside it changes what that tokenizer does, and nobody else reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmc.errors import UserError
from llmc.export.onnx.verify import difference, token_ids
from llmc.export.parity import GENERATED, PLEASE_REPORT, PROMPT
from llmc.files import read_json, write_json
from llmc.formats.chat_template import Template
from llmc.formats.check_text import CHECK_TEXT
from llmc.formats.tokenizer_json import TOKENIZER
from llmc.runtimes.onnx_session import genai_library

MODULE = "tokenizer_module.json"
# For all classes but Gemma's, onnxruntime-extensions cuts a SentencePiece text as Llama 3 does, inside a run of spaces too.
# For Gemma's it cuts only before words, where no piece of SentencePiece goes across
LIKE_GEMMA = "GemmaTokenizer"
SPELLED = "genai_tokenizer.json"
# The regular expression that the step ByteLevel of the package tokenizers stands for
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def prove(folder: Path, tokenizer: Any, template: Template | None, rows: int, context_length: int) -> dict[str, Any]:
    """Open the folder in onnxruntime-genai, compare the token ids and continue PROMPT greedily; return the results.

    template: the chat templates of the folder. rows: of the embedding."""
    og = genai_library()
    try:
        model = og.Model(str(folder))
    except RuntimeError as e:
        raise UserError(f"onnxruntime-genai does not open the folder: {e}", PLEASE_REPORT) from e
    theirs = _tokenizer(og, model, folder, tokenizer)
    ids = token_ids("onnxruntime-genai", _encoder(theirs), folder, tokenizer, template, rows)
    params = og.GeneratorParams(model)
    prompt = list(tokenizer(PROMPT)["input_ids"])
    params.set_search_options(max_length=min(len(prompt) + GENERATED, context_length), do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    made = generator.get_sequence(0).tolist()
    return {"token_ids": ids, "generated": tokenizer.decode(made, skip_special_tokens=True),
            "generated_tokens": len(made) - len(prompt)}


def note_of_special(tokenizer: Any) -> list[str]:
    """A note if the tokenizer puts special tokens around a text, which onnxruntime-genai does only if asked."""
    before, after = _special(tokenizer)
    if not (added := before + after):
        return []
    return [f"the model's tokenizer adds {' and '.join(map(str, tokenizer.convert_ids_to_tokens(added)))} to a text; "
            'onnxruntime-genai does so after tokenizer.update_options(add_special_tokens="true")']


def _tokenizer(og: Any, model: Any, folder: Path, tokenizer: Any) -> Any:
    """onnxruntime-genai's tokenizer of the folder. If it gives other ids, MODULE is written into the folder, and SPELLED."""
    before, after = _special(tokenizer)
    spelled = _spelled(read_json(folder / TOKENIZER))
    if spelled is None:
        module: dict[str, Any] = {"tokenizer_class": LIKE_GEMMA, "add_bos_token": bool(before), "add_eos_token": bool(after)}
    else:
        module = {"tiktoken_file": SPELLED}  # its name for the file with the vocabulary, whatever the kind
    for again in (False, True):
        if again:
            write_json(folder / MODULE, module)
            if spelled is not None:
                write_json(folder / SPELLED, spelled)
        try:
            theirs = og.Tokenizer(model)
        except RuntimeError as e:
            raise UserError(f"onnxruntime-genai does not open the tokenizer: {e}", PLEASE_REPORT) from e
        if difference(_encoder(theirs), tokenizer, CHECK_TEXT) is None:
            break
        if tokenizer.backend_tokenizer.model.__class__.__name__ != "BPE":
            break
    return theirs


def _spelled(spec: dict[str, Any]) -> dict[str, Any] | None:
    """tokenizer.json with each step that cuts text as a regular expression, because onnxruntime-extensions obeys no others.
    None if it has steps for which there is none, or none at all."""
    step = spec.get("pre_tokenizer") or {}
    found = []
    for part in step.get("pretokenizers", [step]):
        if part.get("type") == "Digits" and part["individual_digits"]:
            found.append(r"\p{N}")
        elif part.get("type") == "ByteLevel" and not part["add_prefix_space"]:
            found += [WORDS] if part["use_regex"] else []
        elif part.get("type") == "Split" and "Regex" in part["pattern"] and part["behavior"] == "Isolated":
            found.append(part["pattern"]["Regex"])
        else:
            return None
    steps = [{"type": "Split", "pattern": {"Regex": x}, "behavior": "Isolated", "invert": False} for x in found]
    return {**spec, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}


def _encoder(theirs: Any) -> Callable[[str, bool], list[int]]:
    """The ids that onnxruntime-genai's tokenizer gives a text, with or without special tokens around it."""
    def encode(text: str, special: bool) -> list[int]:
        theirs.update_options(add_special_tokens=str(special).lower())
        return [int(i) for i in theirs.encode(text)]
    return encode


def _special(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text."""
    plain, whole = (list(tokenizer("a", add_special_tokens=x)["input_ids"]) for x in (False, True))
    at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return whole[:at], whole[at + len(plain) :]
