"""Token ids around special tokens and in chat prompts, every chat template, and tokenizers that pad or cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from gguf_files import export
from tiny import build

import llmc
from llmc.errors import UserError
from llmc.export import token_proof
from llmc.export.windows import ignored
from llmc.formats.artifacts.gguf import GgufArtifact
from llmc.formats.chat_template import hash_template, in_one_form, template_in
from llmc.formats.gguf import field
from llmc.formats.hf import load_config, load_tokenizer
from llmc.formats.tokenizer_files import copy_tokenizer_files
from llmc.formats.tokenizer_json import open_tokenizer_json
from llmc.runtimes.onnx_model import tokenize

CHAT = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}<s>assistant\n"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT
TWO = [{"name": "default", "template": CHAT}, {"name": "tool use", "template": NO_SYSTEM}]


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def with_token(folder: Path, content: str, **flags: Any) -> Path:
    """A model of 513 rows whose last token is added with these flags."""
    build("llama", folder, num_hidden_layers=1, vocab_size=513)
    spec = json.loads((folder / "tokenizer.json").read_text())
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    edit(folder / "tokenizer.json", added_tokens=[*spec["added_tokens"], {"id": 512, "content": content, **plain, **flags}])
    return folder


@pytest.mark.parametrize(("content", "flags", "kind"), [
    ("<end>", {"rstrip": True}, "rstrip"), ("<end>", {"lstrip": True}, "lstrip"),
    ("cat", {"single_word": True, "special": False}, "single_word"), ("<end>", {}, None)])
def test_tokens_that_llama_cpp_treats_otherwise_are_named(content: str, flags: dict[str, Any], kind: str | None,
                                                          tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = export(with_token(tmp_path / "m", content, **flags))
    beside = report["token_ids"]["around_added_tokens"]
    assert beside["compared"] == 3
    assert beside["unlike"] == ({} if kind is None else {kind: 1})
    assert (f"around {content!r} than the model's tokenizer ({kind})" in capsys.readouterr().err) is (kind is not None)


def test_a_chat_prompt_with_other_ids_is_an_error(tmp_path: Path) -> None:
    folder = with_token(tmp_path / "m", "<end>", rstrip=True)
    (folder / "chat_template.jinja").write_text(CHAT.replace("</s>", "<end>"))
    with pytest.raises(UserError, match=r"other token ids for a prompt of the chat template 'default'.*<end>") as e:
        export(folder)
    assert "--chat-template drop" in e.value.hint
    assert not list(tmp_path.glob("*.gguf"))
    assert export(folder, chat_template="drop")["token_ids"]["chat_tokens"] == {}


def test_every_chat_template_goes_into_the_file(tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "m", num_hidden_layers=1)
    edit(folder / "tokenizer_config.json", chat_template=TWO)
    report = export(folder)
    reader = GGUFReader(report["path"])
    assert field(reader, "tokenizer.chat_template") == CHAT
    assert field(reader, "tokenizer.chat_template.tool_use") == NO_SYSTEM
    assert field(reader, "tokenizer.chat_templates") == ["tool_use"]
    counts = report["token_ids"]["chat_tokens"]
    assert set(counts) == {"default", "tool use"}
    assert counts["default"] > counts["tool use"] > 20  # the second has no system message
    facts = GgufArtifact(Path(report["path"])).facts()
    assert not [k for k in facts["metadata"] if "chat_template" in k]
    assert report["chat_template_sha256"] == llmc.inspect(folder)["tokenizer"]["chat_template_sha256"]


def test_a_template_that_fails_is_said_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = build("llama", tmp_path / "m", num_hidden_layers=1)
    (folder / "chat_template.jinja").write_text("{{ tools[0].name.upper() }}")
    assert export(folder)["token_ids"]["chat_tokens"] == {"default": None}
    assert "could not be rendered" in capsys.readouterr().err


def test_an_eos_behind_every_text_is_said(tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "m", num_hidden_layers=1)
    text, end = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}
    edit(folder / "tokenizer.json", post_processor={
        "type": "TemplateProcessing", "single": [text, end], "pair": [text, end, text, end],
        "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}}})
    assert any("'</s>' after every text" in note for note in export(folder)["notes"])


# ---------------------------------------------------------------------------------------------- files of templates and tokens


@pytest.mark.parametrize("form", ["list", "files", "processor", "string"])
def test_templates_are_found_as_transformers_finds_them(form: str, tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "m", num_hidden_layers=1)
    expected: Any = CHAT if form in ("processor", "string") else TWO
    if form == "files":
        (folder / "chat_template.jinja").write_text(CHAT)
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates/tool use.jinja").write_text(NO_SYSTEM)
    elif form == "processor":
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHAT}))
    else:
        edit(folder / "tokenizer_config.json", chat_template=expected)
    assert template_in(folder) == expected
    assert in_one_form(load_tokenizer(folder).chat_template, folder) == expected
    (tmp_path / "copy").mkdir()
    copy_tokenizer_files(folder, tmp_path / "copy")
    assert template_in(tmp_path / "copy") == expected
    assert hash_template(template_in(tmp_path / "copy")) == llmc.inspect(folder)["tokenizer"]["chat_template_sha256"]


def test_a_template_that_is_no_text_is_refused(tmp_path: Path) -> None:
    for wrong in (3, [{"name": "default", "template": None}], {"default": 1}):
        with pytest.raises(UserError, match="chat template"):
            in_one_form(wrong, tmp_path)
    assert in_one_form([], tmp_path) is None
    assert in_one_form({"default": "x"}, tmp_path) == "x"


def test_padding_and_truncation_are_left_out_and_ignored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = build("llama", tmp_path / "m", num_hidden_layers=1)
    before = (folder / "tokenizer.json").read_bytes()
    (tmp_path / "same").mkdir()
    copy_tokenizer_files(folder, tmp_path / "same")
    assert (tmp_path / "same/tokenizer.json").read_bytes() == before
    edit(folder / "tokenizer.json",
         padding={"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
                  "pad_token": "<s>"},
         truncation={"direction": "Right", "max_length": 64, "strategy": "LongestFirst", "stride": 0})
    (tmp_path / "copy").mkdir()
    copy_tokenizer_files(folder, tmp_path / "copy")
    written = json.loads((tmp_path / "copy/tokenizer.json").read_text())
    assert written == json.loads(before) | {"padding": None, "truncation": None}
    assert "padding and truncation, which belong to training" in capsys.readouterr().err
    for text in ("hello", "hello world " * 100):
        expected = load_tokenizer(tmp_path / "same")(text)["input_ids"]
        assert load_tokenizer(folder)(text)["input_ids"] == expected
        assert tokenize(folder, text).tolist() == open_tokenizer_json(tmp_path / "copy").encode(text).ids == expected
    assert export(folder)["token_ids"]["around_added_tokens"]["unlike"] == {}


def test_texts_are_compared_one_by_one_to_name_the_first() -> None:
    side = token_proof.Side("it", lambda t: [ord(c) for c in t], lambda t: [ord(c) for c in t.replace("a <x>", "a<x>")], "")

    class Names:
        def decode(self, ids: list[int]) -> str:
            return "".join(map(chr, ids))

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [chr(i) for i in ids]

    tokens = [{"id": 1, "content": "<x>"}, {"id": 2, "content": "<y>"}]
    found = token_proof.added(side, Names(), {"pre_tokenizer": None}, tokens)
    assert found == {"compared": 2, "unlike": {"text beside it": 1}, "tokens": {"text beside it": ["<x>"]}}


# ------------------------------------------------------------------------------------------------------------- windows


def test_a_window_is_noted_where_fewer_layers_have_it(tmp_path: Path) -> None:
    mistral = load_config(build("mistral", tmp_path / "a", sliding_window=64))
    assert "sliding window of 64 tokens" in ignored("it", mistral, 0)[0]
    assert "1 of 2 layers" in ignored("it", mistral, 1)[0]
    assert ignored("it", mistral, 2) == []
    gemma = load_config(build("gemma3_text", tmp_path / "b"))
    assert ignored("it", gemma, 2) == []
    assert "1 of 2 layers" in ignored("it", gemma, 1)[0]
    assert ignored("it", load_config(build("mistral", tmp_path / "c", sliding_window=256)), 0) == []  # the whole context
