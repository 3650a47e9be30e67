"""Items of `llmc eval --tasks`: the harness's prompts from the hub's fields and from flat ones, and bad items."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import write_rows

from llmc.errors import UserError
from llmc.evals.quality import task_items

COLOURS = ["red", "blue as ice", "a dark green", "no colour"]
ROWS: dict[str, dict[str, Any]] = {  # one item of each task as its dataset on the hub has it
    "arc_easy": {"id": "x", "question": "What colour is a ripe tomato?", "answerKey": "2",
                 "choices": {"text": COLOURS, "label": ["1", "2", "3", "4"]}},
    "piqa": {"goal": "open a jar", "sol1": "turn the lid", "sol2": "read to it", "label": 1},
    "hellaswag": {"activity_label": "Making tea [title]", "ctx_a": "A woman boils water. [header] She waits.",
                  "ctx_b": "then SHE", "endings": ["pours  it.", "[step] sings.", "runs.", ", too"], "label": "3"},
    "winogrande": {"sentence": "The cup did not fit the box as _ was too big.", "option1": "the cup",
                   "option2": "the box", "answer": "2"},
    "boolq": {"passage": "Tin is a metal.", "question": "is tin a metal", "label": 1},
    "openbookqa": {"id": "x", "question_stem": "Rain falls from", "answerKey": "D ",
                   "choices": {"text": COLOURS, "label": ["A", "B", "C", "D"]}},
    "lambada": {"text": "He took the key and opened the door"},
}
FLAT: dict[str, dict[str, Any]] = {  # the same items as mosaicml/llm-foundry has them
    "arc_easy": {"query": "Question: What colour is a ripe tomato?", "choices": COLOURS, "gold": 1},
    "piqa": {"query": "Question: open a jar\n", "choices": ["turn the lid", "read to it"], "gold": 1},
    "winogrande": {"context_options": ["The cup did not fit the box as the cup", "The cup did not fit the box as the box"],
                   "continuation": "was too big.", "gold": 1},
    "boolq": {"query": "Passage: Tin is a metal.\nQuestion: is tin a metal?", "choices": ["no", "yes"], "gold": 1},
    "openbookqa": {"query": "Rain falls from", "choices": COLOURS, "gold": 3},
}


def answers(context: str, choices: list[str]) -> tuple[tuple[str, str], ...]:
    return tuple((context, " " + c) for c in choices)


PROMPTS: dict[str, tuple[tuple[tuple[str, str], ...], int]] = {
    "arc_easy": (answers("Question: What colour is a ripe tomato?\nAnswer:", COLOURS), 1),
    "piqa": (answers("Question: open a jar\nAnswer:", ["turn the lid", "read to it"]), 1),
    # the harness's own spelling: title to a full stop, other brackets to nothing, double spaces once
    "hellaswag": (answers("Making tea. : A woman boils water. She waits. Then she",
                          ["pours it.", " sings.", "runs.", ", too"]), 3),
    "winogrande": ((("The cup did not fit the box as the cup", " was too big."),
                    ("The cup did not fit the box as the box", " was too big.")), 1),
    "boolq": (answers("Tin is a metal.\nQuestion: is tin a metal?\nAnswer:", ["no", "yes"]), 1),
    "openbookqa": (answers("Rain falls from", COLOURS), 3),
    "lambada": ((("He took the key and opened the", " door"),), 0),
}


@pytest.mark.parametrize("name", sorted(ROWS))
def test_prompts_from_the_hubs_fields(name: str, tmp_path: Path) -> None:
    task = task_items.load([f"{name}={write_rows(tmp_path / 'f.jsonl', ROWS[name])}"], 0)[0]
    assert (task.items[0].pairs, task.items[0].gold) == PROMPTS[name]
    assert (task.name, task.source, task.total) == (name, "f.jsonl", 1)


@pytest.mark.parametrize("name", sorted(FLAT))
def test_prompts_from_flat_fields(name: str, tmp_path: Path) -> None:
    item = task_items.load([f"{name}={write_rows(tmp_path / 'f.jsonl', FLAT[name])}"], 0)[0].items[0]
    assert (item.pairs, item.gold) == PROMPTS[name]


def test_other_spellings(tmp_path: Path) -> None:
    """A JSON list, BOM, blank lines, answers as booleans, labels as letters, names as people write them."""
    rows = [{**ROWS["boolq"], "answer": value} for value in (True, False)]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    assert [i.gold for i in task_items.load([f"boolq={tmp_path / 'list.json'}"], 0)[0].items] == [1, 0]
    (tmp_path / "bom.jsonl").write_text("\ufeff" + json.dumps(ROWS["piqa"]) + "\r\n\r\n" + json.dumps(ROWS["piqa"]))
    assert task_items.load([f"piqa={tmp_path / 'bom.jsonl'}"], 0)[0].total == 2
    assert task_items.parse(["arc-easy=a,b.jsonl,PIQA", "lambada_openai=c"]) == {
        "arc_easy": "a,b.jsonl", "piqa": None, "lambada": "c"}


def test_items_are_evenly_spaced(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "f.jsonl", *({"text": f"word {i}"} for i in range(10)))
    for limit, expected in ((4, [0, 2, 5, 7]), (0, range(10)), (99, range(10)), (1, [0])):
        task = task_items.load([f"lambada={path}"], limit)[0]
        assert [int(i.pairs[0][1]) for i in task.items] == list(expected)
        assert task.total == 10


BAD: list[tuple[str, list[Any], str]] = [
    ("piqa", [ROWS["piqa"], {"goal": "x", "sol1": "y"}], r"f\.jsonl, line 2: the field sol2 is missing"),
    ("piqa", [{**ROWS["piqa"], "sol1": 3}], "line 1: the field sol1 is not text"),
    ("piqa", [ROWS["piqa"], "{", ROWS["piqa"], "[]"], r"line 2: not JSON.*\(and 1 more bad items\)"),
    ("piqa", ["7"], "line 1: not a JSON object"),
    ("hellaswag", [{**ROWS["hellaswag"], "label": ""}], "right answer '' is none of 0, 1, 2, 3"),
    ("arc_easy", [{**ROWS["arc_easy"], "answerKey": "E"}], "right answer 'E' is none of 1, 2, 3, 4"),
    ("arc_easy", [{**ROWS["arc_easy"], "choices": {"text": COLOURS, "label": ["A", "B"]}}], "as many labels"),
    ("arc_easy", [{**FLAT["arc_easy"], "choices": ["one"]}], "choices is not a list of two or more texts"),
    ("openbookqa", [{**FLAT["openbookqa"], "query": " "}], "nothing before the answer"),
    ("winogrande", [{**ROWS["winogrande"], "sentence": "no blank"}], "the sentence has no _"),
    ("lambada", [{"text": "alone"}], "does not end with a space and a word"),
    ("lambada", [{"query": "x"}], r"the field text is missing \(there are query\)"),
    ("lambada", [""], "holds no items"),
]


@pytest.mark.parametrize(("name", "rows", "words"), BAD)
def test_bad_items_are_named_by_their_line(name: str, rows: list[Any], words: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "f.jsonl", *rows)
    with pytest.raises(UserError, match=words):
        task_items.load([f"{name}={path}"], 0)


@pytest.mark.parametrize(("written", "words"), [
    ("chess=x.jsonl", "'chess' is not known"), ("piqa=nowhere.jsonl", r"there is no file nowhere\.jsonl"),
    ("piqa=", "names no file"), ("piqa=a,piqa=b", "names piqa twice"), ("piqa=.", "is a folder"),
    ("piqa", "needs the package `datasets`"),
])
def test_bad_names_and_files(written: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=words) as e:
        task_items.load([written], 0)
    assert "\n" not in e.value.problem
    assert e.value.hint


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "f.parquet").write_bytes(b"PAR1\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        task_items.load([f"piqa={tmp_path / 'f.parquet'}"], 0)


def test_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(repo: str, config: str, split: str) -> list[dict[str, Any]]:
        if repo == "baber/piqa":
            raise ConnectionError("offline mode is on")
        return [ROWS["arc_easy"]] * 3

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(__version__="4.1.0", load_dataset=load_dataset))
    task = task_items.load(["arc_easy"], 2)[0]
    assert (task.source, task.total, len(task.items)) == ("allenai/ai2_arc ARC-Easy test", 3, 2)
    with pytest.raises(UserError, match="offline mode is on") as e:
        task_items.load(["piqa"], 2)
    assert "piqa=FILE" in e.value.hint
