"""`llmc bench`: measure artifacts in turns, on one target after the other."""

from __future__ import annotations

from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, cast

from llmc.console import progress, say, warn
from llmc.errors import UserError
from llmc.evals.bench import summary
from llmc.evals.bench.config import BenchConfig
from llmc.evals.bench.host import Child
from llmc.evals.bench.prompt import prompt_ids
from llmc.evals.bench.ran import ran
from llmc.evals.bench.threads import sweep
from llmc.evals.report import store as report
from llmc.evals.report.schema import Described, Facts, Report, RuntimeFacts, Speed
from llmc.evals.report.sections import targets_of
from llmc.formats import kv
from llmc.formats.artifact import Size
from llmc.formats.artifacts.table import artifact_at
from llmc.places import check_place, real
from llmc.runtimes.targets.device import Device, connect, probed
from llmc.runtimes.targets.target import Target, find_target
from llmc.sources.resolve import locate


class TargetsError(UserError):
    """Some targets failed. `reports` has the results of the others."""

    def __init__(self, failed: dict[str, UserError], reports: list[Report]) -> None:
        problems = [f"target {name}: {e.problem}" + (f" (next: {e.hint})" if e.hint else "") for name, e in failed.items()]
        kept = targets_of(reports)
        super().__init__("; ".join(problems), f"what was measured on {', '.join(kept)} is kept" if kept else "")
        self.reports = reports


def bench(config: BenchConfig) -> list[Report]:
    """Return one report for each artifact, with a speed section for each target. After each target, write `config.outputs`.

    Raises TargetsError at the end if a target failed and there is more than one.
    """
    for path in config.outputs:
        check_place(path, [config])
    if len({real(path) for path in config.outputs}) < len(config.outputs):
        raise UserError("two reports would have the same file", "give one -o for each artifact")
    targets = [find_target(name, config.targets) for name in config.target]
    artifacts = [locate(a) for a in config.artifacts]
    described = [report.describe_artifact(a) for a in artifacts]
    for i, path in enumerate(config.outputs):
        report.check_output(path, described[i]["sha256"], config.kv or artifact_at(artifacts[i]).kv_default)
    ids = [prompt_ids(a, max(config.prompt + config.depth)) for a in artifacts]
    reports: list[Report | None] = [None] * len(described)
    failed: dict[str, UserError] = {}
    for target in targets:
        if len(targets) > 1:
            say(f"on {target.label()}")
        try:
            with closing(connect(target)) as device:
                sections = measure_device(device, artifacts, described, ids, config)
        except UserError as e:
            failed[target.name] = e
            if len(targets) > 1:
                warn(f"target {target.name}: {e.problem}")
            continue
        for i, section in enumerate(sections):
            made = report.new_report(described[i], "speeds", {target.name: section})
            reports[i] = report.merged(reports[i], made)
            if config.outputs:
                report.save(config.outputs[i], made)
    if failed and len(targets) == 1:
        raise failed[targets[0].name]
    if failed:
        raise TargetsError(failed, [r for r in reports if r])
    return [r for r in reports if r]


def measure_device(device: Device, artifacts: list[Path], described: list[Described], ids: list[list[int]],
                   config: BenchConfig) -> list[Speed]:
    """Measure all artifacts in turns on one device. Returns their speed sections. ids: prompt token ids of each artifact."""
    job = {"context": max(config.prompt + config.depth) + config.generate, "threads": config.threads, "kv": config.kv,
           "device": "gpu" if device.target.address == "local-gpu" else config.device}
    say(f"measuring the memory bandwidth of {device.target.name}")
    facts = cast(Facts, probed(device))
    placed = [device.place(a) for a in artifacts]
    with ExitStack() as stack:
        children = [stack.enter_context(Child(device, a, p, job)) for a, p in zip(artifacts, placed, strict=True)]
        for child, tokens in zip(children, ids, strict=True):
            child.ask("ids", ids=tokens)
        runs = _repeat(children, config)
        ends = [child.ask("end") for child in children]
    sections = [_section(device.target, facts, child.loaded, ends[i], runs[i], described[i],
                         [d["name"] for j, d in enumerate(described) if j != i], job, config)
                for i, child in enumerate(children)]
    if config.thread_sweep:
        for section, artifact, path, tokens in zip(sections, artifacts, placed, ids, strict=True):
            section["thread_sweep"] = sweep(device, artifact, path, tokens, job, _command(config), facts)
    return sections


def _command(config: BenchConfig) -> dict[str, Any]:
    """The arguments of one repetition, for the process on the device."""
    return {"prompts": list(config.prompt), "depths": list(config.depth), "generate": config.generate}


def _repeat(children: list[Child], config: BenchConfig) -> list[list[dict[str, Any]]]:
    """The measured repetitions of each child, after its warm-ups. Stops when all medians are known well enough, or after
    `max_repetitions`."""
    runs: list[list[dict[str, Any]]] = [[] for _ in children]
    with progress("repetition", config.warmup + config.max_repetitions) as p:
        for i in range(config.warmup + config.max_repetitions):
            for child, out in zip(children, runs, strict=True):
                out.append(child.ask("run", **_command(config)))
            p.step("warm-up" if i < config.warmup else
                   f"{config.generate / runs[0][-1]['decode_s'][str(config.depth[0])]:.1f} tokens/s")
            kept = [out[config.warmup :] for out in runs]
            enough = len(kept[0]) >= config.repetitions
            if enough and all(summary.is_tight(summary.curves(k, config.generate)) for k in kept):
                break
    return kept


def _section(target: Target, facts: Facts, loaded: dict[str, Any], end: dict[str, Any], runs: list[dict[str, Any]],
             described: Described, others: list[str], job: dict[str, Any], config: BenchConfig) -> Speed:
    """One artifact's speed section. others: names of the artifacts that were measured in turns with it."""
    runtime: RuntimeFacts = loaded["runtime"]
    measured = summary.curves(runs, config.generate)
    first, deep = measured["prefill_curve"][0], measured["decode_curve"][0]
    read, throttled = token_bytes(described["size"], runtime), summary.throttled(runs)
    return {
        "target": {"name": target.name, "address": target.address, "emulated": target.emulated,
                   "facts": facts},
        "protocol": {"prompt": first["tokens"], "depth": deep["depth"], "generate": config.generate,
                     "threads": runtime["threads"], "device": job["device"], "cpu": facts["cpu"],
                     "cores": facts["physical_cores"]},
        "warmup": config.warmup, "repetitions": len(runs), "load_s": loaded["load_s"], "peak_rss": int(end["peak_rss"]),
        "prefill": first["prefill"], "first_token": first["first_token"], "decode": deep["decode"], **measured,
        "throttled": throttled, "unstable": [*throttled, *summary.unstable(measured)],
        "conditions": summary.conditions(runs), "energy": summary.energy(runs, config.generate),
        "runtime": runtime, "ran": ran(runtime), "kv": kv.section(described["kv"], runtime["kv_type"]), "token_bytes": read,
        "read_bandwidth": read * deep["decode"]["median"],
        "load_average": {"before": loaded["load_average"], "after": end["load_average"]},
        "in_turns_with": others, "thread_sweep": None,
    }


def token_bytes(size: Size, runtime: RuntimeFacts) -> int:
    """Bytes of weights that one decoded token reads, in the type in which the runtime holds them.

    The KV cache is not counted: it is small at these lengths.
    """
    if runtime["runtime"] != "torch":
        return int(size["token_bytes"])
    unread = 0 if size["tied"] else size["classes"]["embedding"]["parameters"]
    read = size.get("token_parameters", size["parameters"] - unread)
    return int(read) * {"float32": 4, "float16": 2, "bfloat16": 2}[runtime["dtype"]]
