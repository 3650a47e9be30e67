"""`llmc bench`: load time, time to first token, decode speed and peak memory of artifacts on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from llmc.console import progress, say
from llmc.errors import UserError
from llmc.evals import report
from llmc.evals.bandwidth import copy_bandwidth
from llmc.evals.config import BenchConfig
from llmc.runtimes.base import locate
from llmc.runtimes.targets import this_machine

UNSTABLE = 0.10  # spread (IQR / median) or drift (first to last repetition / median) past which a speed is no figure


def bench(config: BenchConfig) -> list[dict[str, Any]]:
    """One report for each artifact, with its `speed` section; written to `config.outputs` where those are given."""
    artifacts = [locate(a) for a in config.artifacts]
    threads = config.threads or this_machine.physical_cores()
    described = [report.describe_artifact(a) for a in artifacts]  # also draws the files into the page cache
    for i, path in enumerate(config.outputs):
        report.check_output(path, described[i]["sha256"])
    load_before = this_machine.load_average()
    say(f"measuring the copy bandwidth of {threads} thread{'s' if threads > 1 else ''}")
    copy = copy_bandwidth(threads)
    with ExitStack() as stack:
        children = [stack.enter_context(_Child(a, config, threads)) for a in artifacts]
        runs: list[list[dict[str, float]]] = [[] for _ in children]
        total = config.warmup + config.repetitions
        with progress("repetition", total) as p:
            for i in range(total):
                for child, out in zip(children, runs, strict=True):
                    out.append(child.ask("run"))
                p.step("warm-up" if i < config.warmup else f"{config.generate / runs[0][-1]['decode_s']:.1f} tokens/s")
        peaks = [int(child.ask("end")["peak_rss"]) for child in children]
    machine = this_machine.describe()
    reports = []
    for i, child in enumerate(children):
        speed = {
            "protocol": {"prompt": config.prompt, "generate": config.generate, "threads": threads,
                         "device": config.device, "cpu": machine["cpu"], "cores": machine["physical_cores"]},
            "warmup": config.warmup, "repetitions": config.repetitions, "load_s": child.loaded["load_s"],
            "peak_rss": peaks[i], **summarise(runs[i][config.warmup :], config.prompt, config.generate),
            "runtime": child.loaded["runtime"], "machine": machine, "copy_bandwidth": copy,
            "load_average": {"before": load_before, "after": this_machine.load_average()},
            "in_turns_with": [d["name"] for j, d in enumerate(described) if j != i],
        }
        speed["token_bytes"] = token_bytes(described[i]["size"], child.loaded["runtime"])
        speed["read_bandwidth"] = speed["token_bytes"] * speed["decode"]["median"]
        reports.append(report.new_report(described[i], "speed", speed))
    for path, made in zip(config.outputs, reports, strict=False):
        report.save(path, made)
    return reports


def summarise(runs: list[dict[str, float]], prompt: int, generate: int) -> dict[str, Any]:
    """Speeds in tokens/s and the time to the first token in s, each as {median, iqr, values}, and why they are unstable
    (a list, empty where they are not)."""
    first = np.array([r["first_token_s"] for r in runs])
    decode = generate / np.array([r["decode_s"] for r in runs])
    out = {"prefill": _spread(prompt / first), "first_token": _spread(first), "decode": _spread(decode)}
    reasons = [f"{name} {why}" for name in ("prefill", "decode") for why in _unstable(np.array(out[name]["values"]))]
    return {**out, "unstable": reasons}


def _spread(values: np.ndarray) -> dict[str, Any]:
    low, median, high = (float(x) for x in np.percentile(values, (25, 50, 75)))
    return {"median": median, "iqr": high - low, "values": [float(v) for v in values]}


def _unstable(values: np.ndarray) -> list[str]:
    """Why a series of speeds should not be trusted: it spreads, or it drifts (least-squares line, first to last)."""
    s = _spread(values)
    spread = s["iqr"] / s["median"]
    drift = float(np.polyfit(np.arange(len(values)), values, 1)[0]) * (len(values) - 1) / s["median"]
    reasons = [f"spreads by {spread:.0%} (IQR / median)"] if spread > UNSTABLE else []
    return reasons + ([f"drifts by {drift:+.0%} over the repetitions"] if abs(drift) > UNSTABLE else [])


def token_bytes(size: dict[str, Any], runtime: dict[str, Any]) -> int:
    """Bytes of weights that one decoded token reads, in the type in which the runtime holds them.

    The KV cache, small at these lengths, is not counted.
    """
    if runtime["runtime"] != "torch":
        return int(size["token_bytes"])
    unread = 0 if size["tied"] else size["classes"]["embedding"]["parameters"]
    return int(size["parameters"] - unread) * {"float32": 4, "float16": 2, "bfloat16": 2}[runtime["dtype"]]


class _Child:
    """One artifact in its own process (evals/bench_child.py); `loaded` is its first answer."""

    def __init__(self, artifact: Path, config: BenchConfig, threads: int) -> None:
        self.artifact = artifact
        job = {"artifact": str(artifact), "prompt": config.prompt, "generate": config.generate, "threads": threads,
               "device": config.device}
        self.process = subprocess.Popen([sys.executable, "-m", "llmc.evals.bench_child", json.dumps(job)],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> _Child:
        try:
            self.loaded = self._answer()
        except BaseException:  # __exit__ is not called when __enter__ fails
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()

    def ask(self, command: str) -> dict[str, Any]:
        """Send a command, wait for its answer."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(command + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has died: the answer tells
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            why = f"signal {-code}" if code < 0 else f"exit code {code}"
            raise UserError(f"the process that ran {self.artifact.name} ended with {why}",
                            "see its message above; if there is none, memory may have run out")
        answer: dict[str, Any] = json.loads(line)
        if "problem" in answer:
            raise UserError(answer["problem"], answer["hint"])
        return answer
