"""The items of zero-shot tasks, read from a file or the hub. The prompts are those of lm-evaluation-harness 0.4."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmc.errors import UserError
from llmc.small_files import LARGE, read_bytes
from llmc.sources.data_sets import datasets_library

ALIASES = {"lambada_openai": "lambada", "openbook_qa": "openbookqa"}


@dataclass(frozen=True)
class Item:
    """One question. pairs: (context, continuation) of each answer. gold: index of the right answer. lengths: characters of
    each answer, for acc_norm."""

    pairs: tuple[tuple[str, str], ...]
    gold: int
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class TaskKind:
    """How a task is read and scored. measures: metrics in addition to acc. hub: the dataset, configuration and split that
    the harness uses."""

    read: Callable[[dict[str, Any]], Item]
    measures: tuple[str, ...]
    hub: tuple[str, str, str]


@dataclass(frozen=True)
class Task:
    """A task with its selected items. source: name of the file, or of the dataset on the hub. total: items in the source."""

    name: str
    source: str
    sha256: str
    total: int
    items: tuple[Item, ...]

    @property
    def text(self) -> str:
        """The first context and answer of every item, in which to search for calibration text."""
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
    """The index of the right answer's label. Raises ValueError if there is none, as in a split without answers ('' or -1)."""
    for i, label in enumerate(labels):
        if str(value).strip() == str(label).strip():
            return i
    raise ValueError(f"the right answer {value!r} is none of {', '.join(map(str, labels))} (a split without answers?)")


def _choices(context: str, answers: Sequence[str], gold: int) -> Item:
    return Item(tuple((context, f" {a}") for a in answers), gold, tuple(len(a) for a in answers))


def _flat(row: dict[str, Any], prefix: str, context: str) -> Item:
    """An item {query, choices, gold} of mosaicml/llm-foundry's task files. context: the query's format in the harness."""
    query, answers = _field(row, "query"), _texts(row, "choices")
    return _choices(context.format(query.removeprefix(prefix).removesuffix("\n")), answers,
                    _gold(_field(row, "gold", int), range(len(answers))))


def _labelled(row: dict[str, Any], context: str) -> Item:
    """An item of ARC or OpenBookQA: choices {text, label} and answerKey."""
    choices = _field(row, "choices", dict)
    answers, labels = _texts(choices, "text"), _texts(choices, "label")
    if len(answers) != len(labels):
        raise ValueError("choices does not have as many labels as texts")
    return _choices(context, answers, _gold(_field(row, "answerKey"), labels))


QUESTION = "Question: {}\nAnswer:"


def _arc(row: dict[str, Any]) -> Item:
    if "query" in row:
        return _flat(row, "Question: ", QUESTION)
    return _labelled(row, QUESTION.format(_field(row, "question")))


def _openbookqa(row: dict[str, Any]) -> Item:
    return _flat(row, "", "{}") if "query" in row else _labelled(row, _field(row, "question_stem"))


def _piqa(row: dict[str, Any]) -> Item:
    if "query" in row:
        return _flat(row, "Question: ", QUESTION)
    answers = [_field(row, "sol1"), _field(row, "sol2")]
    return _choices(QUESTION.format(_field(row, "goal")), answers, _gold(_field(row, "label", object), (0, 1)))


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
    """Remove [header], [title] and [step] of WikiHow, then replace double spaces once, as the harness does."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _winogrande(row: dict[str, Any]) -> Item:
    """Each answer fills the blank. The text after the blank is scored, because it is equal for all answers."""
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
    "lambada": TaskKind(_lambada, ("perplexity",), ("EleutherAI/lambada_openai", "default", "test")),
    "arc_easy": TaskKind(_arc, ("acc_norm",), ("allenai/ai2_arc", "ARC-Easy", "test")),
    "arc_challenge": TaskKind(_arc, ("acc_norm",), ("allenai/ai2_arc", "ARC-Challenge", "test")),
    "piqa": TaskKind(_piqa, ("acc_norm",), ("baber/piqa", "default", "validation")),
    "hellaswag": TaskKind(_hellaswag, ("acc_norm",), ("Rowan/hellaswag", "default", "validation")),
    "winogrande": TaskKind(_winogrande, (), ("allenai/winogrande", "winogrande_xl", "validation")),
    "boolq": TaskKind(_boolq, (), ("aps/super_glue", "boolq", "validation")),
    "openbookqa": TaskKind(_openbookqa, ("acc_norm",), ("allenai/openbookqa", "main", "test")),
}


# ----------------------------------------------------------------------------------------------------------- reading


def parse(written: Sequence[str]) -> dict[str, str | None]:
    """Return {task: file or None} for texts like 'arc_easy=arc.jsonl,piqa'. A file name may contain a comma."""
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
    """Load the tasks of --tasks. limit: largest number of items of each task, evenly spaced over its file; 0 for all."""
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
        raise UserError(f"{bad[0]}{more}", f"give items of {name} with the fields of its dataset {KINDS[name].hub[0]}")
    if not items:
        raise UserError(f"{source} holds no items", f"give a JSONL file with items of {name}")
    return items


def _from_file(name: str, path: Path) -> tuple[str, str, list[tuple[str, Any]]]:
    """Return the name, the sha256 and the (place, row) pairs of a JSONL file, or of a JSON file that is one list."""
    try:
        raw = read_bytes(path, LARGE, f"give {name}=FILE")
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text (byte {e.start})", "convert it to JSONL, one item a line") from e
    except UserError as e:
        raise UserError(f"--tasks {name}: {e.problem}", e.hint) from e
    digest = hashlib.sha256(raw).hexdigest()
    if text.lstrip().startswith("["):
        try:
            return path.name, digest, [(f"item {i + 1}", row) for i, row in enumerate(json.loads(text))]
        except (ValueError, RecursionError) as e:
            raise UserError(f"{path} is not JSON: {e}", "give JSONL, one item a line") from e
    lines = ((f"line {i + 1}", line) for i, line in enumerate(text.split("\n")) if line.strip())
    return path.name, digest, [(where, _parsed(line)) for where, line in lines]


def _parsed(line: str) -> Any:
    """The value of one line. For invalid JSON, return a ValueError: `_items` reports it with the other bad items."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as e:
        return ValueError(f"not JSON: {e}")


def _from_hub(name: str) -> tuple[str, str, list[tuple[str, Any]]]:
    """Like `_from_file`, for the split that the harness uses. The sha256 is that of the rows as JSON lines. No code from the
    hub is run."""
    repo, config, split = KINDS[name].hub
    advice = f"give its items: --tasks {name}=FILE"
    datasets = datasets_library(f"the task {name} without a file", advice)
    try:
        rows = [dict(row) for row in datasets.load_dataset(repo, config, split=split)]
    except (OSError, ValueError, RuntimeError) as e:
        raise UserError(f"{repo} is not in the cache and cannot be loaded from the Hugging Face hub: "
                        f"{(str(e).splitlines() or [type(e).__name__])[0]}", advice) from e
    text = "\n".join(json.dumps(row, sort_keys=True) for row in rows)
    return (f"{repo} {config} {split}", hashlib.sha256(text.encode()).hexdigest(),
            [(f"row {i + 1}", row) for i, row in enumerate(rows)])
