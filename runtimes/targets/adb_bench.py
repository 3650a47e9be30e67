"""on_device/bench.py and facts.py for a device without Python: a process on this machine runs llama-bench on the device.

llama-bench uses random tokens; on_device/bench.py uses those of a text. This does not change the time. Each repetition starts
llama-bench again, with its own warm-up.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import UTC, datetime
from typing import Any

from llmc.errors import UserError
from llmc.runtimes.on_device import facts as there
from llmc.runtimes.targets.adb_shell import AdbShell, facts
from llmc.runtimes.targets.shell import run

# Runs "$@" and reads VmHWM, the process's peak memory, until it ends. The last value follows the JSON.
BENCH = """
"$@" & pid=$!
peak=0
while kill -0 $pid 2>/dev/null; do
  now=$(grep VmHWM "/proc/$pid/status" 2>/dev/null | tr -dc 0-9); peak=${now:-$peak}; sleep 0.1
done
wait $pid || exit
echo "peak_kb=$peak"
"""


class Bench:
    """Runs llama-bench on one file. job: {artifact, context, threads, device, engine}, with paths on the device."""

    def __init__(self, shell: AdbShell, job: dict[str, Any]) -> None:
        self.shell, self.job = shell, job
        self.threads = job["threads"] or facts(shell)["usable_cores"]
        self.peak = 0

    def run(self, *args: str) -> list[dict[str, Any]]:
        """llama-bench's result of each test."""
        layers = "99" if self.job["device"] == "gpu" else "0"
        kv = ["-ctk", self.job["kv"], "-ctv", self.job["kv"]] if self.job.get("kv") else []
        out = run(self.shell, BENCH, self.job["engine"], "-m", self.job["artifact"], "-o", "json", "-r", "1", "-t",
                  str(self.threads), "-ngl", layers, *kv, *args)[1]
        printed, _, peak = out.rpartition("peak_kb=")
        self.peak = max(self.peak, int(peak) * 1024)
        try:
            tests: list[dict[str, Any]] = json.loads(printed[printed.index("[") :])
        except ValueError as e:
            raise UserError(f"{self.shell.name}: llama-bench printed {printed.strip()[:200]!r}",
                            "see its messages above") from e
        return tests

    def load(self) -> tuple[float, dict[str, Any]]:
        """The load time in seconds (from start to end, without the one token), and a description of the runtime."""
        start = time.perf_counter()
        test = self.run("-p", "1", "-n", "0", "--no-warmup")[0]
        seconds = time.perf_counter() - start - test["avg_ns"] / 1e9
        return seconds, {
            "runtime": "llama.cpp", "engine": "llama-bench", "tokens": "random",
            "version": f"{test.get('build_commit')} ({test.get('build_number')})", "device": self.job["device"],
            "offloaded_layers": test.get("n_gpu_layers", 0), "backends": test.get("backends"), "threads": test["n_threads"],
            "kv_type": test.get("type_k", "f16"), "cpu_features": facts(self.shell)["cpu_features"]}

    def repetition(self, prompts: list[int], depths: list[int], generate: int) -> dict[str, Any]:
        """One repetition, in the form of on_device/bench.py."""
        many = self.run("-p", ",".join(map(str, prompts)), "-n", "0")
        deep = self.run("-p", "0", "-n", str(generate), "-d", ",".join(map(str, depths)))
        return {"first_token_s": {str(t["n_prompt"]): t["avg_ns"] / 1e9 for t in many},
                "decode_s": {str(t["n_depth"]): t["avg_ns"] / 1e9 for t in deep},
                "joules": None, "energy_source": None,
                "state": dict.fromkeys(("mhz", "temperature_c", "throttle_events", "throttled_now"))}


def main() -> None:
    """Run one job. argv: one JSON object {module, target, serial, ..the keys of the module's job}."""
    job = json.loads(sys.argv[1])
    try:
        shell = AdbShell(job["target"], job["serial"])
        if job["module"] == there.__name__:
            _answer(**facts(shell), probed=datetime.now(UTC).isoformat(timespec="seconds"))
        else:
            _serve(Bench(shell, job))
    except UserError as e:
        _answer(problem=e.problem, hint=e.hint)


def _serve(bench: Bench) -> None:
    """Answer the lines of stdin in the protocol of runtimes/on_device/bench.py."""
    seconds, runtime = bench.load()
    _answer(load_s=seconds, runtime=runtime, load_average=None)
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "end":
            break
        if command["do"] == "ids":
            _answer(tokens=len(command["ids"]))
        else:
            _answer(**bench.repetition(command["prompts"], command["depths"], command["generate"]))
    _answer(peak_rss=bench.peak, load_average=None)


def _answer(**values: Any) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main()
