"""llmc bench: what is counted and recorded. No test looks at how fast anything was."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from llmc.cli import run
from llmc.errors import UserError
from llmc.evals import bench as bench_module
from llmc.evals import report
from llmc.evals.bandwidth import copy_bandwidth
from llmc.evals.bench import bench, summarise, token_bytes
from llmc.evals.config import BenchConfig
from llmc.evals.weigh import weigh
from llmc.runtimes.targets import this_machine


@pytest.fixture(autouse=True)
def _small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmc.evals.bandwidth.BYTES", 1 << 20)


def small(*artifacts: Path, **more: object) -> BenchConfig:
    return BenchConfig(tuple(str(a) for a in artifacts), prompt=20, generate=3, warmup=1, threads=1, **more)  # type: ignore[arg-type]


def test_two_runtimes_in_turns(made: SimpleNamespace, tmp_path: Path) -> None:
    outputs = (tmp_path / "folder.json", tmp_path / "file.json")
    reports = bench(small(made.gptq, made.gguf, outputs=outputs))
    assert [r["speed"]["runtime"]["runtime"] for r in reports] == ["torch", "llama.cpp"]
    assert [r["speed"]["in_turns_with"] for r in reports] == [["small.gguf"], ["small"]]
    for path, r in zip(outputs, reports, strict=True):
        s = r["speed"]
        assert report.read_report(path)["speed"] == s
        for key in ("prefill", "first_token", "decode"):
            assert len(s[key]["values"]) == s["repetitions"] == 5  # warm-ups are not among them
            assert all(v > 0 for v in s[key]["values"])
            assert s[key]["median"] == np.median(s[key]["values"])
        assert s["protocol"] == {"prompt": 20, "generate": 3, "threads": 1, "device": "cpu",
                                 "cpu": this_machine.cpu_model(), "cores": this_machine.describe()["physical_cores"]}
        assert s["load_s"] > 0
        assert s["peak_rss"] > 10_000_000
        assert s["copy_bandwidth"] > 0
        assert s["read_bandwidth"] == s["token_bytes"] * s["decode"]["median"]
        assert set(s["load_average"]) == {"before", "after"}
        assert {"cpu_features", "governor", "memory", "physical_cores"} <= set(s["machine"])
        assert isinstance(s["unstable"], list)


def test_one_report_holds_quality_and_speed(made: SimpleNamespace) -> None:
    options = ["--threads", "1", "-o", "r.json"]
    assert run(["eval", str(made.gguf), "--base", str(made.base), "--context", "64", "--chunks", "2", *options]) == 0
    assert run(["bench", str(made.gguf), "--prompt", "9", "--generate", "2", "--warmup", "0", *options]) == 0
    both = report.read_report(Path("r.json"))
    assert both["quality"]["texts"]
    assert both["speed"]["warmup"] == 0
    assert run(["bench", str(made.base), "--prompt", "9", "--generate", "2", *options]) == 2


def test_command_line_prints(made: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["bench", str(made.gguf), "--prompt", "9", "--generate", "2", "--warmup", "0", "--threads", "1"]
    assert run([*args, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["speed"]["repetitions"] == 5
    assert run(args) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("load", "time to first token", "prefill", "decode", "peak memory", "copy bandwidth"))


def test_peak_memory_is_the_childs_own(made: SimpleNamespace) -> None:
    """Linux gives a new process its parent's peak as ru_maxrss; what this process holds must not show."""
    mine = np.ones(40_000_000)  # 320 MB
    assert bench(small(made.gguf))[0]["speed"]["peak_rss"] < mine.nbytes


def runs(decode: list[float], first: float = 0.1) -> list[dict[str, float]]:
    return [{"first_token_s": first, "decode_s": d} for d in decode]


def test_summary() -> None:
    s = summarise(runs([2.0, 1.0, 4.0, 2.0, 2.0], first=0.5), prompt=100, generate=8)
    assert s["decode"]["values"] == [4, 8, 2, 4, 4]
    assert s["decode"]["median"] == 4
    assert s["prefill"] == {"median": 200, "iqr": 0, "values": [200] * 5}
    assert s["first_token"]["median"] == 0.5


@pytest.mark.parametrize(("decode", "why"), [
    ([1.0, 1.01, 0.99, 1.0, 1.0], []), ([1.0, 1.5, 0.9, 1.4, 1.0], ["spreads"]),
    ([1.0, 1.03, 1.06, 1.1, 1.13], ["drifts"]), ([1.0, 1.2, 1.4, 1.6, 1.8], ["spreads", "drifts"]),
])
def test_unstable(decode: list[float], why: list[str]) -> None:
    found = summarise(runs(decode), 10, 10)["unstable"]
    assert len(found) == len(why)
    assert all(f.startswith(f"decode {w}") for f, w in zip(found, why, strict=True))


def test_bytes_of_a_token(made: SimpleNamespace) -> None:
    file, folder = weigh(made.gguf), weigh(made.gptq)
    assert token_bytes(file, {"runtime": "llama.cpp"}) == file["tensor_bytes"]  # tied: the embedding is read as the head
    assert token_bytes(folder, {"runtime": "torch", "dtype": "float32"}) == 4 * folder["parameters"]
    untied = {"tied": False, "parameters": 100, "classes": {"embedding": {"parameters": 40}}}
    assert token_bytes(untied, {"runtime": "torch", "dtype": "float32"}) == 240


def test_bad_input(made: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--repetitions 4"):
        BenchConfig((str(made.gguf),), repetitions=4)
    with pytest.raises(UserError, match="2 artifacts and 1 report"):
        BenchConfig(("a", "b"), outputs=(tmp_path / "one.json",))
    with pytest.raises(UserError, match="do not fit"):  # said in the child, raised here
        bench(BenchConfig((str(made.gguf),), prompt=1000, threads=1))


def test_a_child_that_dies_is_reported(made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    started = bench_module.subprocess.Popen
    monkeypatch.setattr(bench_module.subprocess, "Popen", lambda args, **k: started(
        [args[0], "-c", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"], **k))
    with pytest.raises(UserError, match=r"small\.gguf ended with signal 11"):
        bench(small(made.gguf))


def test_no_child_outlives_an_error(made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    children = []
    started = bench_module.subprocess.Popen
    monkeypatch.setattr(bench_module.subprocess, "Popen", lambda *a, **k: children.append(started(*a, **k)) or children[-1])
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(made.gguf.read_bytes()[:-100])
    with pytest.raises(UserError):
        bench(small(made.gguf, broken))
    for child in children:
        assert child.poll() is not None


def test_copy_bandwidth_counts_reads_and_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr("llmc.evals.bandwidth.time.perf_counter", lambda: next(clock))
    assert copy_bandwidth(3) == 2 * (1 << 20)  # bytes in each "second" of that clock
