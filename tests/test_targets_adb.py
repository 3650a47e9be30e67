"""Android over adb: the real client against a server of the adb protocol whose device is this machine's shell."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from adb_server import Server

from llmc.errors import UserError
from llmc.runtimes.targets import shell
from llmc.runtimes.targets.adb import AdbDevice, connected
from llmc.runtimes.targets.setup import clean, setup
from llmc.runtimes.targets.target import Target

NEEDED = "LLMC_NEED_ADB"  # set where adb must be there: a test that cannot have it fails instead of being skipped
SERIAL = "emulator-5554"
# Stands for the program of that name: the same options and JSON, times that follow from them.
LLAMA_BENCH = """#!/bin/sh
p=0 n=0 d=0
while [ $# -gt 0 ]; do
  case $1 in -p) p=$2;; -n) n=$2;; -d) d=$2;; -t) t=$2;; -m) m=$2;; esac; shift
done
[ -f "$m" ] || { echo "error: failed to load model '$m'" >&2; exit 1; }
sleep 0.3
sep='['
for x in $(echo "$p" | tr , ' '); do for y in $(echo "$d" | tr , ' '); do
  printf '%s{"build_commit": "abc", "build_number": 7, "n_threads": %s, "n_prompt": %s, "n_gen": %s, "n_depth": %s,
    "type_k": "f16", "backends": "CPU", "avg_ns": %s}' "$sep" "$t" "$x" "$n" "$y" $(((x+n)*1000000+y)); sep=,
done; done
echo ']'
"""


@pytest.fixture
def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    if shutil.which("adb") is None:
        (pytest.fail if os.environ.get(NEEDED) else pytest.skip)("no adb here: apt-get install adb")
    programs = tmp_path / "system/bin"
    programs.mkdir(parents=True)
    server = Server(SERIAL, str(programs))
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(server.port))
    monkeypatch.delenv("ADB_SERVER_SOCKET", raising=False)
    yield server
    server.close()


@pytest.fixture
def target(tmp_path: Path) -> Target:
    return Target("phone", f"adb:{SERIAL}", cache=str(tmp_path / "data local/llmc"), cache_gb=1)


def test_bytes_arguments_and_exit_codes_pass(phone: Server, target: Target) -> None:
    android = connected(target)
    awkward = "it's $(id) `id` \"new\nline\" -rf *"
    assert shell.run(android, 'printf %s "$1"; exit 7', awkward, expect=(7,)) == (7, awkward)
    data = np.random.default_rng(0).bytes(300_000)
    process = android.popen("cat", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.communicate(data)[0] == data


def test_artifacts_go_to_the_cache(phone: Server, target: Target, tmp_path: Path) -> None:
    artifact = tmp_path / "a b.gguf"
    artifact.write_bytes(np.random.default_rng(1).bytes(2 << 20))
    device = AdbDevice(target)
    there = Path(device.place(artifact))
    assert there.is_relative_to(target.cache)
    assert there.read_bytes() == artifact.read_bytes()
    with pytest.raises(UserError, match=r"is not a \.gguf file; on Android llmc runs only those"):
        device.place(tmp_path)
    device.close()
    assert clean(target) == (pytest.approx(2 << 20, rel=0.1), 0)


def test_llama_bench_answers_as_bench_child_does(phone: Server, target: Target, tmp_path: Path) -> None:
    artifact, program = tmp_path / "a.gguf", tmp_path / "llama-bench"
    artifact.write_bytes(b"x")
    program.write_text(LLAMA_BENCH)
    device = AdbDevice(target)
    job = {"artifact": device.place(artifact), "context": 600, "threads": 3, "device": "cpu"}
    with pytest.raises(UserError, match="phone has no llama-bench") as e:
        device.start("llmc.runtimes.on_device.bench", job)
    assert "--llama-bench PATH" in e.value.hint
    found = setup(target, install=False, runtimes=("gguf",), llama_bench=program)
    assert found["packages"] == {"llama-bench": f"{target.cache}/bin/llama-bench"}
    child = device.start("llmc.runtimes.on_device.bench", job)
    asked = [{"do": "ids", "ids": [1, 2]}, {"do": "run", "prompts": [128, 512], "depths": [0, 512], "generate": 8},
             {"do": "end"}]
    out, _ = child.communicate("".join(json.dumps(line) + "\n" for line in asked))
    loaded, fed, ran, ended = (json.loads(line) for line in out.splitlines())
    assert loaded["runtime"] | {"cpu_features": []} == {
        "runtime": "llama.cpp", "engine": "llama-bench", "tokens": "random", "version": "abc (7)", "device": "cpu",
        "offloaded_layers": 0, "backends": "CPU", "threads": 3, "kv_type": "f16", "cpu_features": []}
    assert 0.2 < loaded["load_s"] < 60
    assert fed == {"tokens": 2}
    assert ran["first_token_s"] == {"128": 0.128, "512": 0.512}
    assert ran["decode_s"] == {"0": 0.008, "512": pytest.approx(0.008, rel=1e-3)}
    assert ended["peak_rss"] > 100_000
    child = device.start("llmc.runtimes.on_device.bench", {**job, "artifact": "/nowhere.gguf"})
    told = json.loads(child.communicate("")[0])
    assert told["problem"] == "target phone: error: failed to load model '/nowhere.gguf'"
    device.close()


def test_facts_of_a_phone(phone: Server, target: Target) -> None:
    device = AdbDevice(target)
    facts = json.loads(device.start("llmc.runtimes.on_device.facts", {}).communicate("")[0])
    device.close()
    assert facts["logical_cores"] == len(os.sched_getaffinity(0))
    assert facts["memory"] == pytest.approx(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), rel=0.01)
    assert facts["machine"] == os.uname().machine
    assert "problem" not in facts


def test_a_phone_that_is_not_there(phone: Server) -> None:
    with pytest.raises(UserError, match=r"gone: .*device 'other' not found"):
        connected(Target("gone", "adb:other"))


def test_what_needs_python_is_refused(phone: Server, target: Target) -> None:
    device = AdbDevice(target)
    with pytest.raises(UserError, match="Android device without Python"):
        device.start("llmc.runtimes.on_device.logits", {"artifact": "/a.gguf"})
    device.close()
