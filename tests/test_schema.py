"""The types of reports are true: what eval, bench, compare and fit make has exactly the keys that they name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny

import llmc
from llmc.evals.compare import schema as compared
from llmc.evals.fit import schema as fitted
from llmc.evals.report import schema
from llmc.evals.report.show import speed_lines
from llmc.evals.report.store import read_report, without_arrays
from llmc.typed_dicts import differences

ITEMS = {"arc": [{"query": f"Question: {q}\nAnswer:", "choices": ["red", "dark blue"], "gold": 1} for q in ("sky?", "sea?")],
         "lambada": [{"text": "the sky is very blue"}, {"text": "the grass is so green"}]}


@pytest.fixture(scope="module")
def reports(made: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """All that eval and bench say of a folder and of a file."""
    folder = tmp_path_factory.mktemp("reports")
    (folder / "text.txt").write_text(tiny.corpus()[5000:9000], encoding="utf-8")
    for name, items in ITEMS.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, items)))
    tasks = (f"arc_easy={folder}/arc.jsonl", f"lambada={folder}/lambada.jsonl")
    paths = [folder / "folder.json", folder / "file.json"]
    for artifact, path in zip((made.gptq, made.gguf), paths, strict=True):
        llmc.evaluate(artifact, base=made.base, text=folder / "text.txt", context=64, chunks=3, threads=1, tasks=tasks,
                      out=path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmc.evals.bench.threads.candidates", lambda cores, logical: [1, 2])
        llmc.bench(made.gptq, made.gguf, prompt="9,12", generate=3, warmup=0, max_repetitions=5, threads=1,
                   thread_sweep=True, out=paths)
    return paths


def test_a_report_has_the_keys_of_its_type(reports: list[Path]) -> None:
    for path in reports:
        report = read_report(path)
        assert differences(report, schema.Report) == []
        assert {"quality", "speeds"} <= set(report)
        assert differences(without_arrays(report), schema.Report) == []


def test_compare_and_fit_answer_what_their_types_say(reports: list[Path], tmp_path: Path) -> None:
    answer = llmc.compare(*reports, max_kld="100", min_decode_speedup="0.0001x", page=tmp_path / "p.html")
    assert differences(json.loads(json.dumps(answer)), compared.Comparison) == []
    assert answer["gates"]
    judged = llmc.fit(*reports, target=("pi5",), min_decode=1, max_kld=1, max_ram="2GB")
    assert differences(json.loads(json.dumps(judged)), fitted.Fit) == []


def test_a_bench_of_a_device_without_a_probe_is_shown(reports: list[Path]) -> None:
    """Android tells no bandwidth."""
    report = read_report(reports[1])
    shown = speed_lines(report)
    assert "of what this machine reads" in shown
    del report["speeds"]["local-cpu"]["target"]["facts"]["read_bandwidth"]
    assert speed_lines(report) == re.sub(r", [^,]* of what this machine reads .*", "", shown)


def test_the_walk_finds_what_is_wrong(reports: list[Path]) -> None:
    report: Any = read_report(reports[0])
    del report["quality"]["texts"][0]["perplexity"]["se"]
    report["quality"]["texts"][0]["klds"] = None
    report["speeds"]["local-cpu"]["load_s"] = "fast"
    assert differences(report, schema.Report) == [
        "it['quality']['texts'][0]['klds'] is not in Text", "it['quality']['texts'][0]['perplexity']['se'] is missing",
        "it['speeds']['local-cpu']['load_s'] is 'fast', no <class 'float'>"]
