"""The items of zero-shot tasks: read from a file or the hub, in the words that lm-evaluation-harness 0.4 asks them in."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmc.errors import UserError
from llmc.sources.data_sets import datasets_library

ALIASES = {"lambada_openai": "lambada", "openbook_qa": "openbookqa"}


@dataclass(frozen=True)
class Item:
    """pairs: (context, continuation) of each answer    lengths: of each answer in characters, for acc_norm"""

    pairs: tuple[tuple[str, str], ...]
    gold: int
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Kind:
    """measures: beside acc    hub: dataset, configuration and split that the harness takes"""

    read: Callable[[dict[str, Any]], Item]
    measures: tuple[str, ...]
    hub: tuple[str, str, str]


@dataclass(frozen=True)
class Task:
    """The items that are used of `total`; `source` is the file's name or the hub's."""

    name: str
    source: str
    sha256: str
    total: int
    items: tuple[Item, ...]

    @property
    def text(self) -> str:
        """All that is asked, for the search for calibration text in it."""
        return "\n".join(context + continuation for item in self.items for context, continuation in item.pairs[:1])


# ------------------------------------------------------------------------------------------------------- items of a file


def _field(row: dict[str, Any], name: str, kind: type = str) -> Any:
    if name not in row:
        raise ValueError(f"the field {name} is missing (there are {', '.join(map(str, row)) or 'none'})")
    if not isinstance(row[name], kind):
        raise ValueError(f"the field {name} is not {'text' if kind is str else f'a {kind.__name__}'}")
    return row[name]


def _texts(row: dict[str, Any], name: str) -> list[str]:
    values: list[Any] = _field(row, name, list)
    if len(values) < 2 or not all(isinstance(v, str) for v in values):
        raise ValueError(f"the field {name} is not a list of two or more texts")
    return values


def _gold(value: Any, labels: Sequence[Any]) -> int:
    """The place of the right answer's label; a set without answers (label '' or -1) is told."""
    for i, label in enumerate(labels):
        if str(value).strip() == str(label).strip():
            return i
    raise ValueError(f"the right answer {value!r} is none of {', '.join(map(str, labels))} (a split without answers?)")


def _choices(context: str, answers: Sequence[str], gold: int) -> Item:
    return Item(tuple((context, f" {a}") for a in answers), gold, tuple(len(a) for a in answers))


def _flat(row: dict[str, Any], prefix: str, context: str) -> Item:
    """{query, choices, gold} as in mosaicml/llm-foundry's task files; `context` is the harness's form of the query."""
    query, answers = _field(row, "query"), _texts(row, "choices")
    return _choices(context.format(query.removeprefix(prefix).removesuffix("\n")), answers,
                    _gold(_field(row, "gold", int), range(len(answers))))


def _labelled(row: dict[str, Any], context: str) -> Item:
    """The answers of ARC and OpenBookQA: choices {text, label} and answerKey."""
    choices = _field(row, "choices", dict)
    answers, labels = _texts(choices, "text"), _texts(choices, "label")
    if len(answers) != len(labels):
        raise ValueError("choices has not as many labels as texts")
    return _choices(context, answers, _gold(_field(row, "answerKey"), labels))


ASKED = "Question: {}\nAnswer:"


def _arc(row: dict[str, Any]) -> Item:
    if "query" in row:
        return _flat(row, "Question: ", ASKED)
    return _labelled(row, ASKED.format(_field(row, "question")))


def _openbookqa(row: dict[str, Any]) -> Item:
    return _flat(row, "", "{}") if "query" in row else _labelled(row, _field(row, "question_stem"))


def _piqa(row: dict[str, Any]) -> Item:
    if "query" in row:
        return _flat(row, "Question: ", ASKED)
    answers = [_field(row, "sol1"), _field(row, "sol2")]
    return _choices(ASKED.format(_field(row, "goal")), answers, _gold(_field(row, "label", object), (0, 1)))


def _boolq(row: dict[str, Any]) -> Item:
    if "query" in row:
        return _flat(row, "Passage: ", "{}\nAnswer:")
    label = int(_field(row, "answer", bool)) if "answer" in row else _field(row, "label", object)
    return _choices(f"{_field(row, 'passage')}\nQuestion: {_field(row, 'question')}?\nAnswer:", ("no", "yes"),
                    _gold(int(label) if isinstance(label, bool) else label, (0, 1)))


def _hellaswag(row: dict[str, Any]) -> Item:
    context = f"{_field(row, 'activity_label')}: {_field(row, 'ctx_a')} {_field(row, 'ctx_b').capitalize()}"
    answers = [_without_brackets(e) for e in _texts(row, "endings")]
    return _choices(_without_brackets(context), answers, _gold(_field(row, "label", object), range(len(answers))))


def _without_brackets(text: str) -> str:
    """WikiHow's [header], [title] and [step] taken out, one pass over double spaces, as in the harness."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _winogrande(row: dict[str, Any]) -> Item:
    """The answers are put before the rest of the sentence, and it is the rest that is scored."""
    if "context_options" in row:
        contexts, rest = _texts(row, "context_options"), _field(row, "continuation").strip()
        gold = _gold(_field(row, "gold", int), range(len(contexts)))
    else:
        before, blank, after = _field(row, "sentence").partition("_")
        if not blank:
            raise ValueError("the sentence has no _ for the options")
        contexts, rest = [before + _field(row, f"option{i}") for i in (1, 2)], after.strip()
        gold = _gold(_field(row, "answer", object), (1, 2))
    return Item(tuple((c, f" {rest}") for c in contexts), gold, (len(rest),) * len(contexts))


def _lambada(row: dict[str, Any]) -> Item:
    context, space, word = _field(row, "text").rpartition(" ")
    if not space or not word:
        raise ValueError("the text does not end with a space and a word")
    return Item(((context, f" {word}"),), 0, (len(word),))


KINDS = {
    "lambada": Kind(_lambada, ("perplexity",), ("EleutherAI/lambada_openai", "default", "test")),
    "arc_easy": Kind(_arc, ("acc_norm",), ("allenai/ai2_arc", "ARC-Easy", "test")),
    "arc_challenge": Kind(_arc, ("acc_norm",), ("allenai/ai2_arc", "ARC-Challenge", "test")),
    "piqa": Kind(_piqa, ("acc_norm",), ("baber/piqa", "default", "validation")),
    "hellaswag": Kind(_hellaswag, ("acc_norm",), ("Rowan/hellaswag", "default", "validation")),
    "winogrande": Kind(_winogrande, (), ("allenai/winogrande", "winogrande_xl", "validation")),
    "boolq": Kind(_boolq, (), ("aps/super_glue", "boolq", "validation")),
    "openbookqa": Kind(_openbookqa, ("acc_norm",), ("allenai/openbookqa", "main", "test")),
}


# ----------------------------------------------------------------------------------------------------------- reading


def parse(written: Sequence[str]) -> dict[str, str | None]:
    """{task: file or None} of 'arc_easy=arc.jsonl,piqa' and the like; a comma inside a file's name may stay."""
    found: dict[str, str | None] = {}
    for part in (p for w in written for p in re.split(r",(?=[\w-]+(?:=|,|$))", w)):
        label, equals, path = part.strip().partition("=")
        name = label.strip().lower().replace("-", "_")
        name = ALIASES.get(name, name)
        if name not in KINDS:
            raise UserError(f"--tasks {label!r} is not known", f"choose from {', '.join(KINDS)}")
        if name in found:
            raise UserError(f"--tasks names {name} twice", "leave one of them out")
        if equals and not path:
            raise UserError(f"--tasks {name}= names no file", f"write {name}=FILE")
        found[name] = path or None
    return found


def load(written: Sequence[str], limit: int) -> list[Task]:
    """The tasks of --tasks. limit: the most items of each, evenly spaced over its file; 0 for all."""
    tasks = []
    for name, path in parse(written).items():
        source, digest, rows = _from_hub(name) if path is None else _from_file(name, Path(path).expanduser())
        items = _items(name, source, rows)
        n = min(limit or len(items), len(items))
        tasks.append(Task(name, source, digest, len(items), tuple(items[i * len(items) // n] for i in range(n))))
    return tasks


def _items(name: str, source: str, rows: Iterable[tuple[str, Any]]) -> list[Item]:
    items, bad = [], []
    for where, row in rows:
        try:
            if isinstance(row, ValueError):
                raise row
            if not isinstance(row, dict):
                raise ValueError("not a JSON object")
            item = KINDS[name].read(row)
            if not all(context.strip() for context, _ in item.pairs):
                raise ValueError("there is nothing before the answer")
            items.append(item)
        except ValueError as e:
            bad.append(f"{source}, {where}: {e}")
    if bad:
        more = f" (and {len(bad) - 1} more bad items)" if len(bad) > 1 else ""
        raise UserError(f"{bad[0]}{more}", f"give items of {name} in the fields of its dataset {KINDS[name].hub[0]}")
    if not items:
        raise UserError(f"{source} holds no items", f"give a JSONL file with items of {name}")
    return items


def _from_file(name: str, path: Path) -> tuple[str, str, list[tuple[str, Any]]]:
    """Name, sha256 and (place, row)s of a JSONL file, or of a JSON file that is one list."""
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except OSError as e:
        raise UserError(f"--tasks {name}: {path} cannot be read ({e.strerror})", f"give {name}=FILE") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text (byte {e.start})", "convert it to JSONL, one item a line") from e
    digest = hashlib.sha256(raw).hexdigest()
    if text.lstrip().startswith("["):
        try:
            return path.name, digest, [(f"item {i + 1}", row) for i, row in enumerate(json.loads(text))]
        except ValueError as e:
            raise UserError(f"{path} is not JSON: {e}", "give JSONL, one item a line") from e
    lines = ((f"line {i + 1}", line) for i, line in enumerate(text.split("\n")) if line.strip())
    return path.name, digest, [(where, _parsed(line)) for where, line in lines]


def _parsed(line: str) -> Any:
    """The value of one line, or the ValueError that it is no JSON: `_items` tells of it with the others."""
    try:
        return json.loads(line)
    except ValueError as e:
        return ValueError(f"not JSON: {e}")


def _from_hub(name: str) -> tuple[str, str, list[tuple[str, Any]]]:
    """The split that the harness takes; its sha256 is that of the rows as JSON lines. No code from the hub is run."""
    repo, config, split = KINDS[name].hub
    advice = f"give its items: --tasks {name}=FILE"
    datasets = datasets_library(f"the task {name} without a file", advice)
    try:
        rows = [dict(row) for row in datasets.load_dataset(repo, config, split=split)]
    except (OSError, ValueError, RuntimeError) as e:
        raise UserError(f"{repo} is not in the cache and cannot be had from the Hugging Face hub: "
                        f"{(str(e).splitlines() or [type(e).__name__])[0]}", advice) from e
    text = "\n".join(json.dumps(row, sort_keys=True) for row in rows)
    return (f"{repo} {config} {split}", hashlib.sha256(text.encode()).hexdigest(),
            [(f"row {i + 1}", row) for i, row in enumerate(rows)])
