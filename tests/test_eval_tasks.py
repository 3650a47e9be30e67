"""`llmc eval --tasks`: scores and errors by hand, the same in every runtime, and paired by item."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import Letters, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmc.cli import run
from llmc.errors import UserError
from llmc.evals.compare.config import CompareConfig
from llmc.evals.compare.run import compare
from llmc.evals.compare.tables import tables
from llmc.evals.pages.compare import page
from llmc.evals.quality import task_items, tasks
from llmc.evals.quality.config import EvalConfig
from llmc.evals.quality.run import evaluate
from llmc.evals.report.show import quality_lines


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Several items of four tasks: multiple choice, one-token answers, unequal contexts, last word."""
    words = ["with", "the", "class", "expression", "value", "as", "an", "object", "statement", "name"]
    arc = [{"question": f"Which {w} is the {v} of a function?", "answerKey": "ABCD"[i % 4],
            "choices": {"text": [f"the {v}", w, f"an import {w} of {v}", f"not {v}"], "label": list("ABCD")}}
           for i, (w, v) in enumerate(zip(words, reversed(words), strict=True))]
    boolq = [{"passage": f"The {w} is evaluated first.", "question": f"is the {w} first", "answer": i % 3 == 0}
             for i, w in enumerate(words)]
    wino = [{"sentence": f"The {w} names the {v} because _ is bound.", "option1": f"the {w}", "option2": f"the {v}",
             "answer": str(1 + i % 2)} for i, (w, v) in enumerate(zip(words, reversed(words), strict=True))]
    lambada = [{"text": f"If the object is not found then the {w} of the {v}"} for w in words for v in words[:2]]
    rows = {"arc_easy": arc, "boolq": boolq, "winogrande": wino, "lambada": lambada}
    return {name: write_rows(tmp_path / f"{name}.jsonl", *r) for name, r in rows.items()}


def settings(files: dict[str, Path], **more: Any) -> dict[str, Any]:
    return {"tasks": tuple(f"{n}={p}" for n, p in files.items()), "threads": 1, "no_text": True, **more}


@pytest.mark.parametrize("bos", [None, 42])
def test_spaces_at_the_end_of_a_context_belong_to_the_continuation(bos: int | None) -> None:
    ids, n = tasks.encode(Letters(bos), "ab \n", "cd")
    assert bytes(ids.astype(np.uint8)).decode() == ("*" if bos else "") + "ab \ncd"
    assert n == 4
    assert tasks.encode(Letters(bos), "ab", " cd")[1] == 3


def test_the_left_is_cut_off(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "f.jsonl", {"text": "0123456789 ab"}, {"text": "01 ab"})
    task = task_items.load([f"lambada={path}"], 0)[0]
    prepared = tasks.prepare(task, Letters(42), 6)
    # 6 tokens are fed; the last one of the 7 is only looked up
    assert [bytes(ids.astype(np.uint8)).decode() for (ids, _), in prepared.requests] == ["6789 ab", "*01 ab"]
    assert prepared.cut == 1
    seen = []

    def ask(ids: np.ndarray, first: int) -> np.ndarray:
        seen.append((len(ids), first))
        return np.zeros((len(ids) - 1 - first, 256), dtype=np.float32)

    likelihoods, _ = tasks.score(prepared.requests[0], ask)
    assert likelihoods[0] == pytest.approx(-3 * math.log(256), rel=1e-6)
    assert seen == [(7, 3)]
    with pytest.raises(UserError, match="has 3 tokens beside its context and must have 1 to 2"):
        tasks.prepare(task, Letters(42), 2)


def test_length_decides_acc_norm() -> None:
    item = task_items.Item((("c", " a"),) * 3, 1, (2, 10, 0))
    got = tasks.judge(item, np.array([-4.0, -8.0, -5.0]), False, ("acc_norm",))
    assert got == {"acc": False, "acc_norm": True}


def slow(model: Any, tokenizer: Any, context: str, continuation: str) -> tuple[float, bool]:
    """Log-likelihood of a continuation, nats, from the whole model's log_softmax in float64, one token at a time."""
    whole, head = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (context + continuation, context))
    with torch.no_grad():
        logp = torch.log_softmax(model(torch.tensor([whole])).logits[0].double(), -1)
    where = range(len(head), len(whole))
    return (sum(float(logp[i - 1, whole[i]]) for i in where), all(int(logp[i - 1].argmax()) == whole[i] for i in where))


def test_every_figure_by_hand(made: SimpleNamespace, files: dict[str, Path]) -> None:
    got = evaluate(EvalConfig(str(made.base), **settings(files)))["quality"]
    assert got["texts"] == []
    model = AutoModelForCausalLM.from_pretrained(made.base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(made.base)
    for entry, task in zip(got["tasks"], task_items.load(settings(files)["tasks"], 0), strict=True):
        acc, norm, nll = [], [], []
        for item in task.items:
            scores = [slow(model, tokenizer, *pair) for pair in item.pairs]
            sums = [s for s, _ in scores]
            acc.append(scores[0][1] if task.name == "lambada" else sums.index(max(sums)) == item.gold)
            per = [s / (len(c) - 1) for s, (_, c) in zip(sums, item.pairs, strict=True)]
            norm.append(per.index(max(per)) == item.gold)
            nll.append(-sums[0])
        values = tasks.values_of(entry)
        assert values["acc"].tolist() == acc
        p = np.mean(acc)
        assert entry["acc"]["value"] == pytest.approx(p)
        assert entry["acc"]["se"] == pytest.approx(math.sqrt(p * (1 - p) / (len(acc) - 1)))
        assert (entry["acc_norm"] is not None) == (task.name == "arc_easy")
        if task.name == "arc_easy":
            assert values["acc_norm"].tolist() == norm
            assert entry["acc_norm"]["value"] == pytest.approx(np.mean(norm))
        if task.name == "lambada":
            np.testing.assert_allclose(values["nll"], nll, rtol=1e-4)
            assert entry["perplexity"]["value"] == pytest.approx(math.exp(np.mean(nll)), rel=1e-4)
        assert entry["protocol"]["items"] == len(acc) == entry["protocol"]["of"]
        assert entry["base"] is entry["difference"] is None
    assert 0 < got["tasks"][0]["acc"]["value"] < 1


def test_answers_fed_the_same_ids_share_a_run(made: SimpleNamespace, files: dict[str, Path],
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    from llmc.evals.quality import run as module

    calls = []
    original = module._logits
    monkeypatch.setattr(module, "_logits", lambda *a, **k: calls.append(1) or original(*a, **k))
    one = {"text": "a b"}
    path = write_rows(files["lambada"].with_name("one.jsonl"), one)
    evaluate(EvalConfig(str(made.base), **settings({"lambada": path, "winogrande": files["winogrande"]}, task_items=1)))
    assert len(calls) == 1 + 2
    ids = np.array([1, 2, 3])
    requests = [(ids, 1), (np.array([1, 2, 4]), 1), (np.array([1, 2, 3, 4]), 2)]
    runs = []
    logits = np.log(np.arange(1, 11, dtype=np.float32))[None]

    def ask(ids: np.ndarray, first: int) -> np.ndarray:
        runs.append(len(ids))
        return np.repeat(logits, len(ids) - 1 - first, axis=0)

    got, greedy = tasks.score(requests, ask)
    assert runs == [3, 4]
    assert np.exp(got) == pytest.approx([4 / 55, 5 / 55, 20 / 55**2], rel=1e-5)
    assert not greedy
    likeliest = [(np.array([1, 9, 9]), 2)]  # of ten ids the last has the highest logit
    assert tasks.score(likeliest, ask)[1]


def test_folder_and_file_answer_alike(made: SimpleNamespace, files: dict[str, Path]) -> None:
    """The same codes in torch and in llama.cpp; the base beside both is the same base."""
    folder, file = (evaluate(EvalConfig(str(a), base=str(made.base), **settings(files)))["quality"]
                    for a in (made.gptq, made.gguf))
    assert file["runtime"]["runtime"] == "llama.cpp"
    for a, b in zip(folder["tasks"], file["tasks"], strict=True):
        assert a["protocol"] == b["protocol"]
        assert a["base"] == b["base"]
        assert (tasks.values_of(a)["acc"] == tasks.values_of(b)["acc"]).mean() >= 0.8  # near ties may turn
        if a["perplexity"]:
            np.testing.assert_allclose(tasks.values_of(b)["nll"], tasks.values_of(a)["nll"], atol=0.3)
            assert a["perplexity"]["value"] == pytest.approx(b["perplexity"]["value"], rel=0.05)


def test_difference_to_the_base_is_paired(made: SimpleNamespace, files: dict[str, Path]) -> None:
    base = evaluate(EvalConfig(str(made.base), **settings(files)))["quality"]["tasks"]
    small = evaluate(EvalConfig(str(made.gptq), base=str(made.base), **settings(files)))["quality"]["tasks"]
    for a, b in zip(base, small, strict=True):
        assert b["base"] == {k: a[k] for k in ("acc", "acc_norm", "perplexity")}
        d = tasks.values_of(b)["acc"].astype(float) - tasks.values_of(a)["acc"]
        assert b["difference"]["acc"]["value"] == pytest.approx(d.mean())
        assert b["difference"]["acc"]["se"] == pytest.approx(d.std(ddof=1) / math.sqrt(len(d)))
    ratio = small[3]["difference"]["perplexity_ratio"]["value"]
    assert ratio == pytest.approx(small[3]["perplexity"]["value"] / base[3]["perplexity"]["value"], rel=1e-5)
    itself = evaluate(EvalConfig(str(made.base), base=str(made.base), **settings(files)))["quality"]["tasks"]
    assert all(t["difference"]["acc"] == {"value": 0, "se": 0} for t in itself)


def test_a_short_window_is_told(made: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tiny model takes 256 tokens, however many are asked for."""
    path = write_rows(tmp_path / "f.jsonl", {"text": "the value " * 400 + "of the name"}, {"text": "of the name"})
    got = evaluate(EvalConfig(str(made.gguf), **settings({"lambada": path})))["quality"]["tasks"][0]
    assert (got["cut"], got["window"]) == (1, 256)
    assert "1 items of lambada do not fit 256 tokens" in capsys.readouterr().err


def reports(made: SimpleNamespace, files: dict[str, Path], folder: Path, **more: Any) -> list[Path]:
    paths = []
    for artifact in (made.base, made.gguf):
        paths.append(folder / f"{artifact.name}.json")
        evaluate(EvalConfig(str(artifact), base=str(made.base), output=paths[-1], **settings(files, **more)))
    return paths


def test_compare_pairs_items(made: SimpleNamespace, files: dict[str, Path], tmp_path: Path) -> None:
    paths = reports(made, files, tmp_path)
    result = compare(CompareConfig(tuple(paths)))
    changes = result["artifacts"][1]["differences"]["tasks"]
    small = json.loads(paths[1].read_text())["quality"]["tasks"]
    assert changes == {t["protocol"]["task"]: t["difference"] for t in small}  # the baseline is the base itself
    title, _, rows = tables(result)[-1]
    assert title == "Tasks"
    assert [r[:3] for r in rows[1:3]] == [["arc_easy", "base", "10 of 10"], ["arc_easy", "small.gguf", "10 of 10"]]
    assert "acc_norm %" in rows[0]
    html = page(result)
    assert "<td>winogrande</td>" in html
    assert "Protocol: lambada" in html


def test_compare_refuses_other_items_and_bears_missing_tasks(made: SimpleNamespace, files: dict[str, Path],
                                                             tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    paths = reports(made, files, tmp_path / "a")
    some = {n: files[n] for n in ("boolq", "lambada")}
    fewer = tmp_path / "fewer.json"
    evaluate(EvalConfig(str(made.gguf), base=str(made.base), output=fewer, **settings(some)))
    result = compare(CompareConfig((paths[0], fewer)))
    assert set(result["artifacts"][1]["differences"]["tasks"]) == set(some)
    evaluate(EvalConfig(str(made.gguf), base=str(made.base), output=fewer, **settings(some, task_items=5)))
    with pytest.raises(UserError, match=r"items \(of the task boolq\) is 10 in one and 5 in the other"):
        compare(CompareConfig((paths[0], fewer)))
    write_rows(some["boolq"], *reversed(some["boolq"].read_text().splitlines()))
    evaluate(EvalConfig(str(made.gguf), base=str(made.base), output=fewer, **settings(some)))
    with pytest.raises(UserError, match=r"sha256 \(of the task boolq\)"):
        compare(CompareConfig((paths[0], fewer)))


def test_command_line(made: SimpleNamespace, files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    args = ["eval", str(made.gguf), "--base", str(made.base), "--context", "64", "--chunks", "2", "--threads", "1"]
    more = ["--tasks", f"arc_easy={files['arc_easy']},boolq={files['boolq']}", "--tasks", f"lambada={files['lambada']}",
            "--task-items", "6"]
    assert run([*args, *more, "-o", "r.json"]) == 0
    out = capsys.readouterr().out
    assert "KL divergence" in out
    assert all(name in out for name in ("arc_easy", "boolq", "lambada", "Δ acc_norm"))
    assert run([*args, *more, "--no-text", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [t["protocol"]["items"] for t in printed["quality"]["tasks"]] == [6, 6, 6]
    assert "per_item" not in json.dumps(printed)
    assert "spread between chunks" not in quality_lines(printed)
    assert run([*args, "--json"]) == 0
    assert "tasks" not in json.loads(capsys.readouterr().out)["quality"]
    for bad, words in ((["--no-text"], "nothing to evaluate"), (["--tasks", "piqa=no.jsonl"], "there is no file no.jsonl"),
                       (["--tasks", "go"], "choose from lambada"), ([*more, "--task-items", "-1"], "--task-items -1")):
        assert run([*args, *bad]) == 2
        assert words in capsys.readouterr().err


def test_text_figures_are_the_same_beside_tasks(made: SimpleNamespace, files: dict[str, Path]) -> None:
    common: dict[str, Any] = {"base": str(made.base), "context": 256, "chunks": 2, "threads": 1}
    alone = evaluate(EvalConfig(str(made.gguf), **common))["quality"]
    both = evaluate(EvalConfig(str(made.gguf), tasks=settings(files)["tasks"], **common))["quality"]
    assert both["texts"] == alone["texts"]
