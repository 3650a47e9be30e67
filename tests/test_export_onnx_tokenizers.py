"""ONNX export of SentencePiece tokenizers: onnxruntime-genai must give the model's token ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import build

pytest.importorskip("onnxruntime_genai")
pytest.importorskip("onnx_ir")
from onnx_files import export

from llmc.errors import UserError
from llmc.formats.hf import load_tokenizer
from llmc.runtimes.onnx_session import genai_library

BYTES = 259  # special tokens and bytes, before the pieces
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
CODE = "def f():\n    return 1\n        x\n  y  z"


def with_runs(folder: Path, **parts: Any) -> Path:
    """Give the tokenizer of a folder pieces of several spaces, as those of Llama 2 and Mistral have."""
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text()) | parts
    model = spec["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].get)
    single = [p for p in pieces[BYTES:] if len(p) == 1]
    longer = [p for p in pieces[BYTES:] if len(p) > 1]
    runs = ["▁" * n for n in (2, 4, 3, 8)]
    pieces = [*pieces[:BYTES], *single, *runs, *longer][: len(pieces)]
    model["vocab"] = {piece: i for i, piece in enumerate(pieces)}
    known = set(pieces[BYTES:])
    model["merges"] = [[p[:i], p[i:]] for p in pieces[BYTES:] for i in range(1, len(p)) if p[:i] in known and p[i:] in known]
    path.write_text(json.dumps(spec))
    return folder


@pytest.mark.parametrize(("family", "style", "parts"), [
    ("llama", "llama", {}), ("phi3", "llama", {}), ("mistral", "llama", {"normalizer": None, "pre_tokenizer": METASPACE}),
    ("gemma3_text", "gemma", {}), ("llama", "llama", {"post_processor": None})])
def test_pieces_of_several_spaces_are_right(family: str, style: str, parts: dict[str, Any], tmp_path: Path) -> None:
    folder = with_runs(build(family, tmp_path / "m", style=style, tie_word_embeddings=False), **parts)
    report = export(folder, dtype="fp32")
    out = tmp_path / "m-onnx"
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes(), "others read this file"
    begins = "post_processor" not in parts
    assert any("adds <s> to a text" in n for n in report["notes"]) is begins
    og = genai_library()
    theirs, ours = og.Tokenizer(og.Model(str(out))), load_tokenizer(folder)
    assert "▁▁▁▁" in ours.tokenize(CODE)
    assert theirs.encode(CODE).tolist() == ours(CODE, add_special_tokens=False)["input_ids"]
    theirs.update_options(add_special_tokens="true")
    assert theirs.encode(CODE).tolist() == ours(CODE)["input_ids"]
    assert theirs.decode(theirs.encode(CODE)).strip() == CODE


def test_digits_that_are_cut_one_by_one(tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "m")
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text())
    digits = {"type": "Digits", "individual_digits": True}  # SmolLM's
    *merges, (left, right) = spec["model"]["merges"]
    spec["model"]["vocab"]["12"] = spec["model"]["vocab"].pop(left + right)  # a piece that the step keeps from being made
    spec["model"]["merges"] = [*merges, ["1", "2"]]
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, spec["pre_tokenizer"]]}
    path.write_text(json.dumps(spec))
    export(folder, dtype="fp32")
    theirs, ours = genai_library().Tokenizer(genai_library().Model(str(tmp_path / "m-onnx"))), load_tokenizer(folder)
    text = "in 1212 of 2000.12 it's 3.12"
    assert theirs.encode(text).tolist() == ours(text)["input_ids"]
    assert ours.tokenize("12") == ["1", "2"]
    assert (tmp_path / "m-onnx" / "genai_tokenizer.json").is_file()
    assert (tmp_path / "m-onnx" / "tokenizer.json").read_bytes() == path.read_bytes()


def test_a_tokenizer_that_stays_different_is_refused(tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "m", style="llama")
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text())
    spec["normalizer"]["normalizers"].append({"type": "Lowercase"})  # which onnxruntime-genai does not do
    path.write_text(json.dumps(spec))
    with pytest.raises(UserError, match="onnxruntime-genai does not tokenize as the model does: after '<s>' it gives"):
        export(folder)
    assert not (tmp_path / "m-onnx").exists()
