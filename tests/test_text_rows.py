"""Texts of the user's: what a file is read as, what is refused, and how sequences begin."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny import corpus, tokenizer

from llmc.compress.text import load_answers, load_calibration, rows_in
from llmc.errors import UserError
from llmc.evals.quality.texts import load_text
from llmc.formats import text_files
from llmc.formats.text_ends import bos_of, sequences
from llmc.formats.text_rows import conversation, read_documents

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
CHAT = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
# row, its form, the document
FORMS: list[tuple[Any, str, str]] = [
    ({"text": "plain"}, "text", "plain"),
    ("plain", "text", "plain"),
    ({"messages": CHAT}, "messages", "[user]Q[assistant]A"),
    (CHAT, "messages", "[user]Q[assistant]A"),
    ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, "conversations",
     "[user]Q[assistant]A"),
    ({"system": "S", "conversations": CHAT}, "conversations", "[system]S[user]Q[assistant]A"),
    ({"instruction": "Q", "input": "", "output": "A"}, "instruction", "[user]Q[assistant]A"),
    ({"instruction": "Q", "input": "I", "output": "A"}, "instruction", "[user]Q\n\nI[assistant]A"),
    ({"instruction": "Q", "context": "I", "response": "A"}, "instruction", "[user]Q\n\nI[assistant]A"),
    ({"prompt": "Q", "completion": "A"}, "prompt", "[user]Q[assistant]A"),
    ({"prompt": CHAT[:1], "response": CHAT[1:]}, "prompt", "[user]Q[assistant]A"),
    ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "preference", "[user]Q[assistant]A"),
    ({"chosen": CHAT, "rejected": CHAT[:1]}, "preference", "[user]Q[assistant]A"),
    ({"chosen": "Human: Q", "rejected": "x"}, "preference", "Human: Q"),
]


def chatty() -> Any:
    tok = tokenizer()
    tok.chat_template = TEMPLATE
    return tok


@pytest.mark.parametrize(("row", "form", "document"), FORMS)
def test_every_form_becomes_its_document(row: Any, form: str, document: str, tmp_path: Path) -> None:
    for name, text in (("a.json", json.dumps([row])), ("a.JSONL", json.dumps(row))):
        (tmp_path / name).write_text(text)
        found = read_documents(tmp_path / name, chatty())
        assert (found.texts, dict(found.rows)) == ([document], {form: 1})
        assert rows_in(str(tmp_path / name)) == {form: 1}


@pytest.mark.parametrize("row", [
    {"question": "x"}, {"text": None}, {"messages": "x"}, {"instruction": "x"}, {"prompt": "x"},
    {"prompt": "x", "completion": 1}, {"conversations": []},
    {"conversations": [{"from": "martian", "value": "x"}]}, 3, None, [], {}, [1]])
def test_other_rows_are_refused_with_the_form_to_write(row: Any) -> None:
    with pytest.raises(UserError, match="row 7") as e:
        conversation(row, "row 7")
    assert "messages" in e.value.hint or "human" in e.value.hint


def test_what_was_interpreted_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"instruction": "Q", "output": "A", "id": 1}] * 3))
    read_documents(tmp_path / "a.json", chatty())
    said = capsys.readouterr().err
    assert "3 rows of the form 'instruction' are read as a conversation" in said
    assert "of each row 'id' is not read" in said
    with pytest.raises(UserError, match="the model has no chat template"):
        read_documents(tmp_path / "a.json", tokenizer())


def test_sheets_have_columns(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,id\n"one, ""two""\nthree",1\nfour,2\n')
    assert read_documents(tmp_path / "a.csv", None).texts == ['one, "two"\nthree', "four"]
    (tmp_path / "a.TSV").write_text("prompt\tresponse\nQ\tA\n")
    assert read_documents(tmp_path / "a.TSV", chatty()).texts == ["[user]Q[assistant]A"]
    for text, words in (("text\na,b\n", r"line 2 has 2 values, and the first row names 1"),
                        ('text\n"a"b\n', "line 2 is not CSV"),
                        ("id\n1\n", r"line 2 has no form that llmc reads \(the keys 'id'\)")):
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(UserError, match=words):
            read_documents(tmp_path / "bad.csv", None)


def test_parquet_is_read_by_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="needs the package pyarrow") as e:
        read_documents(tmp_path / "a.parquet", None)
    assert "pip install pyarrow" in e.value.hint

    class File:
        def __init__(self, path: Path) -> None:
            if path.name == "bad.parquet":
                raise ValueError("no magic bytes")

        def __enter__(self) -> File:
            return self

        def __exit__(self, *_: object) -> None: ...

        def iter_batches(self, batch_size: int) -> list[Any]:
            return [SimpleNamespace(to_pylist=lambda: [{"text": "one"}, {"text": "two"}])]

    monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace(ArrowException=ValueError))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", SimpleNamespace(ParquetFile=File))
    assert read_documents(tmp_path / "a.parquet", None).texts == ["one", "two"]
    (tmp_path / "bad.parquet").write_bytes(b"PAR")
    with pytest.raises(UserError, match=r"bad\.parquet cannot be read as Parquet: no magic bytes"):
        read_documents(tmp_path / "bad.parquet", None)


def test_lines_end_at_the_line_feed_and_a_mark_is_dropped(tmp_path: Path) -> None:
    text = "a\u2028b\x85c\x0b\x0c\x1cd"
    row = json.dumps({"text": text}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{row}\r\n\r\n{row}\n".encode())
    assert read_documents(tmp_path / "a.jsonl", None).texts == [text, text]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\r\nb")
    assert read_documents(tmp_path / "a.txt", None).texts == ["a\nb"]
    assert load_text(str(tmp_path / "a.txt")) == ("a.txt", "a\nb")


def test_half_characters_are_replaced_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud83d b \\ude00"}\n{"text": "\\ud83d\\ude00"}\n')
    found = read_documents(tmp_path / "a.jsonl", None)
    assert (found.texts, found.origin) == (["a\ufffd b \ufffd", "😀"], {"rows": {"text": 2}, "replaced": 2})
    assert "2 halves of characters" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "text", "words"), [
    ("a.jsonl", '{"text": "x"}\n{', "line 2 is not JSON"), ("a.json", "[" * 100_000, "nested too deeply"),
    ("a.json", "", "is not JSON"),
    ("a.txt", b"\xff", r"not UTF-8 text \(byte 0\)"),
    ("a.jsonl", '{"text": "' + "x" * 200 + '"}', "line 1 has 212 characters")])
def test_damaged_files_are_refused(name: str, text: str | bytes, words: str, tmp_path: Path,
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "MOST_LINE", 150 if "212" in words else 1 << 20)
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=words):
        read_documents(tmp_path / name, None)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_only_regular_files_of_a_bounded_size_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = [tmp_path, tmp_path / "pipe.jsonl"]
    os.mkfifo(places[1])
    for place in (*places, Path("/dev/zero")):
        with pytest.raises(UserError, match="not a text file"):
            read_documents(place, None)
    with pytest.raises(UserError, match="there is no text file"):
        read_documents(tmp_path / "none.txt", None)
    (tmp_path / "big.txt").write_text("12345")
    monkeypatch.setattr(text_files, "MOST_BYTES", 4)
    with pytest.raises(UserError, match="has 5 bytes, and at most 4 are read"):
        read_documents(tmp_path / "big.txt", None)


# ------------------------------------------------------------------------------------------------------ how texts begin


def test_sequences_begin_as_the_tokenizer_begins_a_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(corpus()[:8000])
    for style, bos in (("llama", 1), ("gpt2", None)):
        tok = tokenizer(style)
        assert bos_of(tok) == bos
        found = load_calibration(str(tmp_path / "a.txt"), tok, 4, 32)
        ids = tok(corpus()[:8000], add_special_tokens=False).input_ids
        n = (len(ids) + (bos is not None)) // 32
        first = found.sequences[0].tolist()
        assert first == ([bos, *ids[:31]] if bos is not None else ids[:32])
        assert found.origin["bos"] == bos
        second = found.sequences[1].tolist()
        at = n // 4 * 32 - (bos is not None)
        assert second[1:] == ids[at + 1 : at + 32]
        assert second[0] == (ids[at] if bos is None else bos)


def test_evaluation_cuts_by_the_same_rule() -> None:
    ids = np.arange(10, 21, dtype=np.int32)
    assert sequences(ids, 4, None).tolist() == [[10, 11, 12, 13], [14, 15, 16, 17]]
    assert sequences(ids, 4, 1).tolist() == [[1, 10, 11, 12], [1, 14, 15, 16], [1, 18, 19, 20]]
    assert sequences(ids[:2], 4, 1).shape == (0, 4)


def test_answers_keep_their_places_behind_bos(tmp_path: Path) -> None:
    tok = tokenizer("llama")
    tok.chat_template = ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
                         "{% if add_generation_prompt %}assistant: {% endif %}")
    rows = [{"prompt": "Count.", "completion": "one two three"}] * 30
    (tmp_path / "a.json").write_text(json.dumps(rows))
    found = load_answers(str(tmp_path / "a.json"), tok, 24)
    assert found.answers is not None
    assert set(found.sequences[:, 0].tolist()) == {1}
    assert not found.answers[:, 0].any()
    said = "".join(tok.decode(ids[mask]) for ids, mask in zip(found.sequences, found.answers, strict=True))
    assert said.count("two") > 20
    assert "Count" not in said
    (tmp_path / "b.json").write_text(json.dumps([{"text": "x"}]))
    with pytest.raises(UserError, match="does not tell who says what"):
        load_answers(str(tmp_path / "b.json"), tok, 24)


def test_an_id_without_a_row_in_the_embedding_is_refused(tmp_path: Path) -> None:
    tok = tokenizer()
    tok.add_tokens(["<|tool|>"], special_tokens=True)
    (tmp_path / "a.txt").write_text(corpus()[:4000] + "<|tool|>")
    with pytest.raises(UserError, match=r"has token 512 \(<\|tool\|>\), and the model's embedding has 512 rows"):
        load_calibration(str(tmp_path / "a.txt"), tok, 4, 32, rows=512)
    assert load_calibration(str(tmp_path / "a.txt"), tok, 4, 32, rows=513).tokens == 128
