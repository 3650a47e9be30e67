"""`llmc compare`: compare reports by paired differences from the first one, and check gates.

The difference of two artifacts on the same tokens has a much smaller error than each value. So differences and their standard
errors are computed from the per-token values in the reports.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from llmc.errors import UserError
from llmc.evals.compare import gates
from llmc.evals.compare.config import CompareConfig
from llmc.evals.compare.matrix import matrix
from llmc.evals.compare.schema import Compared, Comparison, Differences, SpeedChange, TextDifference
from llmc.evals.quality import metrics, tasks
from llmc.evals.report.schema import Report, Speed, Spread, Stat, Text
from llmc.evals.report.sections import base_of, kv_type, quality_of, speed_on, speeds_of, targets_of, tasks_of, texts_of
from llmc.evals.report.store import merged, read_report, unpack
from llmc.evals.report.store import without_arrays as report_without_arrays
from llmc.places import check_page

FLOATS = (None, "f32", "f16", "bf16")  # types of a KV cache that are not added to the artifact's name


def compare(config: CompareConfig) -> Comparison:
    """Compare reports with the first, the baseline. Emulated speeds are not compared.

    Raises UserError if the reports are not comparable, or if a gate's metric was not measured.
    """
    limits = gates.parse(config)
    check_page(config.page, config.reports, "choose another file with --page")
    reports = join([read_report(p) for p in config.reports], config.reports)
    check_comparable(reports)
    baseline = reports[0]
    artifacts: list[Compared] = [{"name": r["artifact"]["name"], "report": r,
                                  "differences": None if r is baseline else differences(baseline, r)} for r in reports]
    results = gates.apply(limits, artifacts[1:] or artifacts)
    return {"baseline": baseline["artifact"]["name"], "artifacts": artifacts, "matrix": matrix(artifacts, config),
            "gates": results, "passed": all(g["passed"] for g in results)}


def join(reports: list[Report], paths: tuple[Path, ...]) -> list[Report]:
    """Merge reports of the same artifact (by sha256) and the same type of KV cache. Returns them in order of appearance.

    Another type of KV cache is another candidate. Artifacts with equal names are renamed to their paths. Raises UserError if
    two reports have the same section.
    """
    joined: dict[tuple[str, str | None], Report] = {}
    for report, path in zip(reports, paths, strict=True):
        key = (report["artifact"]["sha256"], kv_type(report))
        before = joined.get(key)
        twice = ["a quality section"] if quality_of(report) and quality_of(before) else []
        twice += [f"the speed on {target}" for target in speeds_of(report) if target in speeds_of(before)]
        if twice:
            raise UserError(f"{path} is the second report with {twice[0]} of {report['artifact']['name']}",
                            "leave one of them out")
        whole = report if before is None else merged(report, before)
        joined[key] = {**whole, "speeds": {**speeds_of(before), **speeds_of(report)}}
    found = [_named(r, f"{r['artifact']['name']} (KV {kv_type(r)})") if kv_type(r) not in FLOATS else r
             for r in joined.values()]
    names = [r["artifact"]["name"] for r in found]
    return [_named(r, r["artifact"]["path"]) if names.count(r["artifact"]["name"]) > 1 else r for r in found]


def _named(report: Report, name: str) -> Report:
    return {**report, "artifact": {**report["artifact"], "name": name}}


def check_comparable(reports: list[Report]) -> None:
    """Check that all reports were measured in the same way. Raises UserError that names the first different field."""
    evaluated = [r for r in reports if quality_of(r)]
    for other in evaluated[1:]:
        _check_equal(evaluated[0], other, _quality_fields(evaluated[0]), _quality_fields(other), "eval")
    for target in targets_of(reports):
        benched = [r for r in reports if target in speeds_of(r)]
        for other in benched[1:]:
            _check_equal(benched[0], other, _speed_fields(benched[0], target), _speed_fields(other, target), "bench")
    # a report may lack a task, but two reports with the same task must have the same items
    first_with: dict[str, Report] = {}
    for report in reports:
        for name in tasks_of(report):
            first = first_with.setdefault(name, report)
            _check_equal(first, report, _task_fields(first, name), _task_fields(report, name), "eval")
    bases = {base["sha256"]: (r, base) for r in evaluated if (base := base_of(r))}
    if len(bases) > 1:
        (one, a), (two, b) = list(bases.values())[:2]
        raise UserError(f"{_unequal(one, two)}: the base is {a['name']} ({a['sha256'][:12]}…) in one and {b['name']} "
                        f"({b['sha256'][:12]}…) in the other", "evaluate both with the same --base")


def _check_equal(one: Report, two: Report, a: dict[str, Any], b: dict[str, Any], command: str) -> None:
    """Raise UserError for the first field that differs. a: protocol of report `one`. b: protocol of report `two`."""
    for field in [*a, *(f for f in b if f not in a)]:
        x, y = a.get(field), b.get(field)
        if x != y:
            raise UserError(f"{_unequal(one, two)}: {field} is {x!r} in one and {y!r} in the other",
                            f"measure both with the same options of `llmc {command}`")


def _unequal(one: Report, two: Report) -> str:
    return f"{one['artifact']['name']} and {two['artifact']['name']} cannot be compared"


def _quality_fields(report: Report) -> dict[str, Any]:
    texts = texts_of(report)
    fields: dict[str, Any] = {"texts": [t["protocol"]["text"] for t in texts]}
    for t in texts:
        fields |= {f"{k} (of the text {t['protocol']['text']})": v for k, v in t["protocol"].items()}
    return fields


def _task_fields(report: Report, name: str) -> dict[str, Any]:
    """The fields of a task's protocol. ids_sha256 comes last: any other difference changes it too and explains more."""
    protocol = sorted(tasks_of(report)[name]["protocol"].items(), key=lambda field: field[0] == "ids_sha256")
    return {f"{k} (of the task {name})": v for k, v in protocol}


def _speed_fields(report: Report, target: str) -> dict[str, Any]:
    return {f"{k} (on {target})": v for k, v in speeds_of(report)[target]["protocol"].items()}


def differences(baseline: Report, other: Report) -> Differences:
    """The differences of `other` from `baseline`. Both must be comparable, see check_comparable."""
    out: Differences = {
        "size_ratio": other["artifact"]["size"]["file_bytes"] / baseline["artifact"]["size"]["file_bytes"],
        "texts": None, "tasks": None, "speeds": None,
    }
    if quality_of(baseline) and quality_of(other):
        out["texts"] = [_paired(a, b) for a, b in zip(texts_of(baseline), texts_of(other), strict=True)]
        new, old = tasks_of(other), tasks_of(baseline)
        out["tasks"] = {name: tasks.differences(tasks.values_of(new[name]), tasks.values_of(old[name]))
                        for name in old if name in new} or None
    after = speeds_of(other)
    out["speeds"] = {t: _speedup(before, after[t]) for t in speeds_of(baseline)
                     if t in after and (before := speed_on(baseline, t))} or None
    return out


def _speedup(baseline: Speed, other: Speed) -> SpeedChange:
    """The changes of speed and memory on one target, relative to the baseline."""
    return {"decode_speedup": _ratio(other["decode"], baseline["decode"]),
            "first_token_ratio": _ratio(other["first_token"], baseline["first_token"]),
            "peak_rss_ratio": other["peak_rss"] / baseline["peak_rss"]}


def _paired(baseline: Text, other: Text) -> TextDifference:
    """Paired differences on one text: the ratio of perplexities, the differences of KL divergence and of top-1 agreement."""
    a, b = ({k: unpack(v) for k, v in t["per_token"].items()} for t in (baseline, other))
    ratio = metrics.perplexity_ratio(b["nll"], a["nll"])
    out: TextDifference = {"text": other["protocol"]["text"], "perplexity_ratio": ratio, "kld": None, "top1": None}
    if "kld" in a and "kld" in b:
        out["kld"] = metrics.mean(b["kld"].astype(np.float64) - a["kld"])
        out["top1"] = metrics.mean(b["top1"].astype(np.float64) - a["top1"])
    return out


def _ratio(other: Spread, baseline: Spread) -> Stat:
    """Ratio of two medians. Its standard error comes from the variance of the logarithms of the repetitions."""
    value = other["median"] / baseline["median"]
    logs = [np.log(s["values"]) for s in (other, baseline)]
    return {"value": value, "se": value * float(np.sqrt(sum(x.var(ddof=1) / len(x) for x in logs)))}


def without_arrays(comparison: Comparison) -> Comparison:
    """The comparison without per-token arrays, for `--json`."""
    artifacts: list[Compared] = [{**a, "report": report_without_arrays(a["report"])} for a in comparison["artifacts"]]
    return {**comparison, "artifacts": artifacts}
