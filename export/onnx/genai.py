"""The proof in onnxruntime-genai: it opens the folder, gives the token ids of the model's tokenizer, and generates.

onnxruntime-genai reads tokenizer.json with a tokenizer of its own (onnxruntime-extensions). A file tokenizer_module.json
beside it changes what that tokenizer does, and nobody else reads it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmc.console import warn
from llmc.errors import UserError
from llmc.export import token_proof
from llmc.export.parity import GENERATED, PLEASE_REPORT, PROMPT, first_difference, show
from llmc.files import read_json, write_json
from llmc.formats.chat_template import Template
from llmc.formats.check_text import CHECK_TEXT, MARKS
from llmc.formats.tokenizer_json import TOKENIZER
from llmc.runtimes.onnx_session import genai_library

MODULE = "tokenizer_module.json"
# For all classes but Gemma's, onnxruntime-extensions cuts a SentencePiece text as Llama 3 does, inside a run of spaces too.
# For Gemma's it cuts only before words, where no piece of SentencePiece goes across
LIKE_GEMMA = "GemmaTokenizer"
LONG = "a" + " " * 130 + "b"
# {key of the report: (text, what is warned of if its ids differ)}
NOTED = {"combining_marks_alike": (MARKS, "words with combining marks (Hindi, Tamil, Thai …)"),
         "leading_space_alike": (" a", "a text that begins with a space"),
         "long_runs_alike": (LONG, "a run of more than 100 characters without a new word")}


def prove(folder: Path, tokenizer: Any, template: Template | None, rows: int, context_length: int) -> dict[str, Any]:
    """Open the folder in onnxruntime-genai, compare the token ids and continue PROMPT greedily; return the results.

    template: the chat templates of the folder. rows: of the embedding."""
    og = genai_library()
    try:
        model = og.Model(str(folder))
    except RuntimeError as e:
        raise UserError(f"onnxruntime-genai does not open the folder: {e}", PLEASE_REPORT) from e
    theirs = _tokenizer(og, model, folder, tokenizer)
    alike = {key: _difference(theirs, tokenizer, text) is None for key, (text, _) in NOTED.items()}
    for key, (_, what) in NOTED.items():
        if not alike[key]:
            warn(f"{what} is tokenized differently by onnxruntime-genai and by transformers")
    theirs.update_options(add_special_tokens="false")  # a chat template names them
    side = token_proof.Side("onnxruntime-genai", lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"]),
                            lambda text: theirs.encode(text).tolist(),
                            "export it as GGUF (--format gguf), or leave the template out (--chat-template drop)")
    prompts = token_proof.chats(side, tokenizer, template)
    spec = read_json(folder / TOKENIZER)
    beside = token_proof.added(side, tokenizer, spec, [t for t in spec.get("added_tokens", []) if t["id"] < rows])
    params = og.GeneratorParams(model)
    prompt = list(tokenizer(PROMPT)["input_ids"])
    params.set_search_options(max_length=min(len(prompt) + GENERATED, context_length), do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    made = generator.get_sequence(0).tolist()
    return {"token_ids": {"text_tokens": len(tokenizer(CHECK_TEXT)["input_ids"]), "chat_tokens": prompts,
                          "around_added_tokens": beside, **alike},
            "generated": tokenizer.decode(made, skip_special_tokens=True), "generated_tokens": len(made) - len(prompt)}


def note_of_special(tokenizer: Any) -> list[str]:
    """A note if the tokenizer puts special tokens around a text, which onnxruntime-genai does only if asked."""
    before, after = _special(tokenizer)
    if not (added := before + after):
        return []
    return [f"the model's tokenizer adds {' and '.join(map(str, tokenizer.convert_ids_to_tokens(added)))} to a text; "
            'onnxruntime-genai does so after tokenizer.update_options(add_special_tokens="true")']


def _tokenizer(og: Any, model: Any, folder: Path, tokenizer: Any) -> Any:
    """onnxruntime-genai's tokenizer of the folder, with special tokens, after its ids were compared. If it cuts pieces that
    hold spaces, MODULE is written into the folder."""
    before, after = _special(tokenizer)
    for module in (None, {"tokenizer_class": LIKE_GEMMA, "add_bos_token": bool(before), "add_eos_token": bool(after)}):
        if module is not None:
            write_json(folder / MODULE, module)
        try:
            theirs = og.Tokenizer(model)
        except RuntimeError as e:
            raise UserError(f"onnxruntime-genai does not open the tokenizer: {e}", PLEASE_REPORT) from e
        theirs.update_options(add_special_tokens="true")
        different = _difference(theirs, tokenizer, CHECK_TEXT)
        if different is None:
            return theirs
        if tokenizer.backend_tokenizer.model.__class__.__name__ != "BPE":
            break
    raise UserError(f"onnxruntime-genai does not tokenize as the model does: {different}",
                    "its tokenizer does not support this kind; export it as GGUF (--format gguf)")


def _special(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text."""
    plain, whole = (list(tokenizer("a", add_special_tokens=x)["input_ids"]) for x in (False, True))
    at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return whole[:at], whole[at + len(plain) :]


def _difference(theirs: Any, tokenizer: Any, text: str) -> str | None:
    """What onnxruntime-genai's tokenizer does otherwise in a text; None if nothing."""
    expected, found = list(tokenizer(text)["input_ids"]), theirs.encode(text).tolist()
    at = first_difference(expected, found)
    return None if at is None else show(at[0], expected, found, tokenizer)
