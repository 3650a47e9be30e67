"""llmc bench: what is counted and recorded. No test looks at how fast anything was."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llmc import machine
from llmc.cli import run
from llmc.errors import UserError
from llmc.evals.bench import summary
from llmc.evals.bench.config import BenchConfig
from llmc.evals.bench.run import TargetsError, bench, token_bytes
from llmc.evals.bench.threads import candidates
from llmc.evals.report import store as report
from llmc.evals.report.show import speed_lines
from llmc.formats.artifacts.table import artifact_at
from llmc.runtimes.on_device.bench import read_anew, repetition
from llmc.runtimes.targets import device
from llmc.runtimes.targets.target import Target


def small(*artifacts: Path, **more: object) -> BenchConfig:
    options: dict[str, object] = {"prompt": 20, "generate": 3, "warmup": 1, "threads": 1, "max_repetitions": 5, **more}
    return BenchConfig(tuple(str(a) for a in artifacts), **options)  # type: ignore[arg-type]


def local(made: dict[str, Any]) -> dict[str, Any]:
    """The one speed section of a report."""
    (found,) = report.speeds_of(made).values()
    return found


def test_two_runtimes_in_turns(made: SimpleNamespace, tmp_path: Path) -> None:
    outputs = (tmp_path / "folder.json", tmp_path / "file.json")
    reports = bench(small(made.gptq, made.gguf, outputs=outputs))
    assert [local(r)["runtime"]["runtime"] for r in reports] == ["torch", "llama.cpp"]
    assert [local(r)["in_turns_with"] for r in reports] == [["small.gguf"], ["small"]]
    for path, r in zip(outputs, reports, strict=True):
        s = local(r)
        assert report.read_report(path)["speeds"] == {"local-cpu": s}
        for key in ("prefill", "first_token", "decode"):
            assert len(s[key]["values"]) == s["repetitions"] == 5  # warm-ups are not among them
            assert all(v > 0 for v in s[key]["values"])
            assert s[key]["median"] == np.median(s[key]["values"])
        assert s["protocol"] == {"prompt": 20, "depth": 20, "generate": 3, "threads": 1, "device": "cpu",
                                 "cpu": machine.cpu_model(), "cores": machine.describe()["physical_cores"]}
        assert s["load_s"] > 0
        assert s["peak_rss"] > 10_000_000
        assert s["read_bandwidth"] == s["token_bytes"] * s["decode"]["median"]
        assert set(s["load_average"]) == {"before", "after"}
        assert {k: s["target"][k] for k in ("name", "address", "emulated")} == {
            "name": "local-cpu", "address": "local-cpu", "emulated": False}
        facts = s["target"]["facts"]
        assert {"cpu_features", "governor", "memory", "physical_cores", "gpus", "temperature_c", "probed"} <= set(facts)
        assert facts["read_bandwidth"] > 0
        assert isinstance(s["unstable"], list)


def test_several_lengths_and_depths(made: SimpleNamespace) -> None:
    (r,) = bench(small(made.gguf, prompt="8,32", depth=(0, 32, 5)))
    s = local(r)
    assert [p["tokens"] for p in s["prefill_curve"]] == [8, 32]
    assert [p["depth"] for p in s["decode_curve"]] == [0, 32, 5]
    assert (s["protocol"]["prompt"], s["protocol"]["depth"]) == (8, 0), "the first of each is the headline"
    assert s["prefill"] == s["prefill_curve"][0]["prefill"]
    assert s["decode"] == s["decode_curve"][0]["decode"]
    for p in s["prefill_curve"]:
        assert p["prefill"]["values"] == [p["tokens"] / t for t in p["first_token"]["values"]]
    lines = speed_lines(r)
    assert lines.count("time to first token") == 2
    assert "3 tokens at depth 32" in lines


class Counter:
    """A runtime that only counts what is in its cache."""

    def __init__(self) -> None:
        self.cached = 0
        self.decoded: list[int] = []

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        self.cached = len(ids)
        return np.zeros(4)

    def decode(self, token: int) -> np.ndarray:
        self.decoded.append(self.cached)
        self.cached += 1
        return np.zeros(4)


def test_decoding_begins_at_its_depth() -> None:
    for depth, seen in ((7, [7, 8, 9]), (3, [3, 4, 5]), (0, [1, 2])):  # the first token of an empty cache is a prefill of one
        runtime = Counter()
        repetition(runtime, np.arange(20), [4, 7], [depth], 3)  # type: ignore[arg-type]
        assert runtime.decoded == seen


def test_one_report_holds_quality_and_speed(made: SimpleNamespace) -> None:
    options = ["--threads", "1", "-o", "r.json"]
    assert run(["eval", str(made.gguf), "--base", str(made.base), "--context", "64", "--chunks", "2", *options]) == 0
    assert run(["bench", str(made.gguf), "--prompt", "9", "--generate", "2", "--warmup", "0", *options]) == 0
    both = report.read_report(Path("r.json"))
    assert both["quality"]["texts"]
    assert local(both)["warmup"] == 0
    assert run(["bench", str(made.base), "--prompt", "9", "--generate", "2", *options]) == 2


def test_command_line_prints(made: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["bench", str(made.gguf), "--prompt", "9", "--generate", "2", "--warmup", "0", "--threads", "1"]
    assert run([*args, "--json"]) == 0
    assert local(json.loads(capsys.readouterr().out))["repetitions"] >= 5
    assert run(args) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("load", "time to first token", "prefill", "decode", "peak memory", "read per token"))


def test_peak_memory_is_the_childs_own(made: SimpleNamespace) -> None:
    """Linux gives a new process its parent's peak as ru_maxrss; what this process holds must not show."""
    mine = np.ones(40_000_000)  # 320 MB
    assert local(bench(small(made.gguf))[0])["peak_rss"] < mine.nbytes


def runs(decode: list[float], first: float = 0.1, prompt: int = 10) -> list[dict[str, Any]]:
    return [{"first_token_s": {str(prompt): first}, "decode_s": {"0": d}} for d in decode]


def test_summary() -> None:
    s = summary.curves(runs([2.0, 1.0, 4.0, 2.0, 2.0], first=0.5, prompt=100), generate=8)
    assert s["decode_curve"] == [{"depth": 0, "decode": {"median": 4, "iqr": 0, "values": [4, 8, 2, 4, 4]}}]
    assert s["prefill_curve"] == [{"tokens": 100, "prefill": {"median": 200, "iqr": 0, "values": [200] * 5},
                                   "first_token": {"median": 0.5, "iqr": 0, "values": [0.5] * 5}}]


@pytest.mark.parametrize(("decode", "why"), [
    ([1.0, 1.01, 0.99, 1.0, 1.0], []), ([1.0, 1.2, 0.9, 1.2, 1.0], ["is known to ±"]),
    ([1.0, 1.002, 1.03, 1.032, 1.1], ["is known to ±", "drifts"]), ([1.0, 1.2, 1.4, 1.6, 1.8], ["is known to ±", "drifts"]),
    ([1.0, 1.0, 1.0, 1.0, 1.13], ["drifts"]),
])
def test_unstable(decode: list[float], why: list[str]) -> None:
    measured = summary.curves(runs(decode), 10)
    found = summary.unstable(measured)
    assert len(found) == bool(why)
    assert all(w in found[0] for w in ("decode", *why) if found)
    assert "".join(found).count(" and ") == max(0, len(why) - 1)
    assert summary.is_tight(measured) == (not any("known" in w for w in why))


@pytest.mark.parametrize("n", [5, 15])
def test_two_benches_of_one_thing_agree_within_their_intervals(n: int) -> None:
    """In about 95 of 100 pairs of normal noise: so two medians that are each known to 1.5 % differ by less than 3 %."""
    rng = np.random.default_rng(0)
    agree = 0
    for _ in range(2000):
        one, two = (summary.spread(rng.normal(100, 4, n)) for _ in range(2))
        agree += abs(one["median"] - two["median"]) <= sum(summary.half_width(s) * s["median"] for s in (one, two))
    assert 0.90 < agree / 2000 < 0.99


def test_repetitions_go_on_until_the_medians_are_known(made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    for tight, wanted in ((True, 5), (False, 8)):
        monkeypatch.setattr(summary, "is_tight", lambda measured, tight=tight: tight)
        assert local(bench(small(made.gguf, max_repetitions=8))[0])["repetitions"] == wanted


def states(**series: list[float | None]) -> list[dict[str, Any]]:
    keys = ("mhz", "temperature_c", "throttle_events", "throttled_now")
    n = len(next(iter(series.values())))
    return [{"state": {k: series[k][i] if k in series else None for k in keys}} for i in range(n)]


def test_throttling_is_noticed() -> None:
    assert summary.throttled(states(mhz=[None] * 6)) == []
    assert summary.throttled(states(mhz=[2400, 2390, 2400, 2380, 2395, 2400], throttle_events=[7] * 6)) == []
    (why,) = summary.throttled(states(mhz=[2400, 2400, 2000, 1900, 1800, 1800]))
    assert why == "the CPU's frequency fell from 2400 to 1800 MHz"
    (why,) = summary.throttled(states(throttle_events=[7, 7, 9]))
    assert "2 times" in why
    (why,) = summary.throttled(states(throttled_now=[False, True, False]))
    assert "firmware" in why
    found = summary.conditions(states(mhz=[2400, 2000, 1800], temperature_c=[50.0, 70.0, 81.5]))
    assert found == {"mhz": [2400, 1800], "temperature_c": [50.0, 81.5]}


def test_a_throttled_bench_is_unstable(made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary, "throttled", lambda runs: ["it was hot"])
    s = local(bench(small(made.gguf))[0])
    assert s["throttled"] == s["unstable"][:1] == ["it was hot"]


def test_energy_of_a_token() -> None:
    runs = [{"joules": j, "energy_source": "RAPL, CPU packages"} for j in (30.0, 32.0, 90.0)]
    assert summary.energy(runs, 16) == {"joules_per_token": 2.0, "source": "RAPL, CPU packages"}
    assert summary.energy([{"joules": None, "energy_source": None}], 16) is None


def test_thread_candidates() -> None:
    assert candidates(1, 1) == [1]
    assert candidates(6, 12) == [1, 2, 3, 4, 5, 6, 7, 8, 12]
    assert candidates(64, 128) == [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64, 96, 128]


def test_a_thread_sweep_names_the_best(made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmc.evals.bench.threads.candidates", lambda cores, logical: [1, 2])
    (r,) = bench(small(made.gguf, thread_sweep=True))
    found = local(r)["thread_sweep"]
    for what in ("prefill", "decode"):
        assert [p["threads"] for p in found[what]] == [1, 2]
        assert found["best"][what] == 1 + (found[what][1]["median"] > found[what][0]["median"])
    assert f"{found['best']['decode']} are best for decode" in speed_lines(r)


def test_what_ran(made: SimpleNamespace) -> None:
    file, folder = (local(r)["ran"] for r in bench(small(made.gguf, made.gptq)))
    assert (file["offloaded_layers"], file["layers"]) == (0, 3)
    assert sum(file["buffers"].values()) > 0
    assert file["instruction_sets"]
    assert folder["device"] == "cpu"


def test_bytes_of_a_token(made: SimpleNamespace) -> None:
    file, folder = artifact_at(made.gguf).weigh(), artifact_at(made.gptq).weigh()
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


def test_an_unreachable_target_leaves_the_others(made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "t.toml", tmp_path / "r.json"
    file.write_text('[targets.far]\naddress = "ssh://nobody@far"\n')

    def connect(target: Target) -> device.Device:
        if target.name == "far":
            raise UserError("far does not answer", "switch it on")
        return device.LocalDevice(target)

    monkeypatch.setattr("llmc.evals.bench.run.connect", connect)
    with pytest.raises(TargetsError, match="target far: far does not answer") as e:
        bench(small(made.gguf, target=("far", "local-cpu"), targets=file, outputs=(out,)))
    assert list(report.speeds_of(e.value.reports[0])) == list(report.speeds_of(report.read_report(out))) == ["local-cpu"]
    with pytest.raises(UserError, match=r"^far does not answer"):
        bench(small(made.gguf, target="far", targets=file))
    args = ["bench", str(made.gguf), "--prompt", "9", "--generate", "2", "--warmup", "0", "--threads", "1", "--json"]
    assert run([*args, "--target", "far", "--target", "local-cpu", "--targets", str(file)]) == 2
    printed = capsys.readouterr()
    assert local(json.loads(printed.out))["target"]["name"] == "local-cpu"
    assert "next: what was measured on local-cpu is kept" in printed.err


def test_a_child_that_dies_is_reported(made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    started = device.subprocess.Popen
    dies = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    monkeypatch.setattr(device.subprocess, "Popen", lambda args, **k: started(
        [args[0], "-c", dies] if "llmc.runtimes.on_device.bench" in args else args, **k))
    with pytest.raises(UserError, match=r"small\.gguf ended with signal 11"):
        bench(small(made.gguf))


def test_no_child_outlives_an_error(made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    children = []
    started = device.subprocess.Popen
    monkeypatch.setattr(device.subprocess, "Popen", lambda *a, **k: children.append(started(*a, **k)) or children[-1])
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(made.gguf.read_bytes()[:-100])
    with pytest.raises(UserError):
        bench(small(made.gguf, broken))
    for child in children:
        assert child.poll() is not None


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system has no posix_fadvise")
def test_an_artifacts_files_are_let_go_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file of a folder, its bytes as they were; folders in it are none of the runtime's."""
    (tmp_path / "sub").mkdir()
    for name in ("a.onnx", "b.data"):
        (tmp_path / name).write_bytes(name.encode() * 1000)
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, start, length, what: asked.append(
        (os.readlink(f"/proc/self/fd/{fd}"), start, length, what)))
    read_anew(tmp_path)
    whole = (0, 0, os.POSIX_FADV_DONTNEED)  # 0 bytes from the start: to the end
    assert asked == [(str(tmp_path / "a.onnx"), *whole), (str(tmp_path / "b.data"), *whole)]
    read_anew(tmp_path / "b.data")
    read_anew(tmp_path / "gone.gguf")
    assert asked[2:] == [(str(tmp_path / "b.data"), *whole)]
    assert (tmp_path / "b.data").read_bytes() == b"b.data" * 1000
