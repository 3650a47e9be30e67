"""`llmc ship GATES.yaml`: decide whether artifacts may ship to devices, and write a summary with the evidence.

    reports: [out/base.json, out/small.json]     # made by llmc eval and bench; paths are relative to this file
    artifacts: [out/small.gguf]                  # artifacts that would ship; a report belongs to one by its sha256
    run: true                                    # measure values that no report has (default: false)
    base: models/base                            # base model of the KL divergence, with `run`
    eval: {text: wikitext, chunks: 40}           # options of llmc eval, with `run`
    allow_estimates: false                       # whether an estimate may pass a gate
    context: 2048
    prompt: 512
    targets:
      pi5:      {min_decode: 10, max_first_token: 3, max_ram: 2GB, max_kld: 0.1, min_top1: 80%, max_size: 1GB, stable: true}
      laptop:   {min_decode: 30, max_ppl_increase: 5%}

A measured value passes a gate if its whole interval meets the limit. If the limit lies inside the interval, the gate is not
decided, and it does not pass (llmc.evals.interval; `llmc compare` has the same rule). An estimate passes only with
`allow_estimates`, and only if the pessimistic end of its interval meets the limit. An emulated speed never passes. Every
artifact is hashed again first.
"""

from __future__ import annotations

import getpass
import platform
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmc.errors import UserError
from llmc.evals.bench.config import BenchConfig
from llmc.evals.compare.run import check_comparable, differences
from llmc.evals.compare.schema import Shipped, Shipping, Verdict
from llmc.evals.fit import run as fits
from llmc.evals.fit.config import FitConfig
from llmc.evals.fit.schema import JudgedFigure, Name
from llmc.evals.interval import UNDECIDED, around, meets
from llmc.evals.quality.config import EvalConfig
from llmc.evals.report.schema import Report
from llmc.evals.report.sections import quality_of, speeds_of
from llmc.evals.report.store import hash_artifact, merged, read_report, save
from llmc.evals.shared_options import parse_number
from llmc.files import read_json
from llmc.formats.artifacts.table import artifact_at
from llmc.formats.manifest import versions
from llmc.places import check_place
from llmc.small_files import parse_yaml, read_text

LIMITS = ("min_decode", "max_first_token", "max_ram", "max_size", "max_kld", "max_kld_p99", "max_kld_p999", "min_top1")
EVAL = ("text", "second_text", "context", "chunks", "threads")
QUALITY = {"max_kld", "max_kld_p99", "max_kld_p999", "min_top1"}
NUMBERS = ("min_decode", "max_first_token", "max_kld", "max_kld_p99", "max_kld_p999")


@dataclass(frozen=True)
class Gates:
    """A gates file. targets: {name: {limit: value}}. Limits: those of FitConfig, max_ppl_increase ('5%') and stable."""

    artifacts: tuple[Path, ...]
    reports: tuple[Path, ...]
    targets: dict[str, dict[str, Any]]
    run: bool = False
    base: str | None = None
    eval: dict[str, Any] = field(default_factory=dict)
    allow_estimates: bool = False
    context: int = FitConfig.context
    prompt: int = FitConfig.prompt
    targets_file: Path | None = None
    file: Path = field(default=Path("gates.yaml"))


def read_gates(path: Path) -> Gates:
    """Read a gates file. Raises UserError that lists all its problems at once."""
    if not path.exists():
        raise UserError(f"there is no gates file {path}", "see `llmc ship --help` for an example")
    content = parse_yaml(read_text(path), str(path), "correct the line that the error names")
    if not isinstance(content, dict):
        raise UserError(f"{path} is no gates file", "see `llmc ship --help` for an example")
    known = {f.name for f in fields(Gates)} - {"file"}
    problems = [f"unknown key {k!r} (known: {', '.join(sorted(known))})" for k in content if k not in known]
    problems += [f"{k} must be a list of files" for k in ("artifacts", "reports")
                 if not isinstance(content.get(k, []), list) or not all(isinstance(v, str) for v in content.get(k, []))]
    problems += [f"{k} must be true or false" for k in ("run", "allow_estimates")
                 if not isinstance(content.get(k, False), bool)]
    problems += [f"{k} must be a whole number" for k in ("context", "prompt") if type(content.get(k, 1)) is not int]
    asked = content.get("eval", {})
    problems += ["eval must be a mapping of options"] if not isinstance(asked, dict) else [
        f"eval: unknown option {k!r} (known: {', '.join(EVAL)})" for k in asked if k not in EVAL]
    problems += [] if content.get("artifacts") else ["artifacts: name what would ship"]
    targets = content.get("targets")
    problems += _target_problems(targets) if isinstance(targets, dict) and targets else ["targets: list devices and limits"]
    if problems:
        raise UserError(f"{path}: " + "; ".join(problems), "see `llmc ship --help`")
    paths = {k: tuple(path.parent / p for p in content.get(k, [])) for k in ("artifacts", "reports")}
    file = content.pop("targets_file", None)
    return Gates(**{**content, **paths, "targets_file": path.parent / file if file else None, "file": path})


def _target_problems(targets: dict[Any, Any]) -> list[str]:
    problems = []
    for name, limits in targets.items():
        if not isinstance(limits, dict) or not limits:
            problems.append(f"target {name}: give it limits")
            continue
        known = (*LIMITS, "max_ppl_increase", "stable")
        problems += [f"target {name}: unknown limit {k!r} (known: {', '.join(known)})" for k in limits if k not in known]
        problems += [f"target {name}: {k} {limits[k]!r} is not a number" for k in NUMBERS
                     if k in limits and (isinstance(limits[k], bool) or not isinstance(limits[k], int | float))]
        if not isinstance(limits.get("stable", True), bool):
            problems.append(f"target {name}: stable must be true or false")
    return problems


def ship(gates: Gates) -> Shipping:
    """Check every artifact against every gate. With `run`, first measure the values that are missing.

    Raises UserError if an artifact changed since it was measured, or if a file is missing.
    """
    missing = [str(a) for a in gates.artifacts if not a.exists()]
    if missing:
        raise UserError(f"there is no {', '.join(missing)}", f"correct `artifacts` in {gates.file}")
    hashes = {a: hash_artifact(a) for a in gates.artifacts}
    read = [read_report(p) for p in gates.reports]
    reports: dict[str, Report] = {}
    for r in read:
        known = r["artifact"]["sha256"]
        reports[known] = merged(reports.get(known), r)
    baseline = read[0] if read else None
    artifacts: list[Shipped] = []
    for path, digest in hashes.items():
        report = reports.get(digest)
        _check_identity(path, digest, reports)
        if gates.run:
            report = measure_missing(gates, path, digest, report)
        results = [r for target, limits in gates.targets.items()
                   for r in _on_target(gates, path, report, baseline, target, limits)]
        artifacts.append({"name": path.name, "path": str(path), "sha256": digest,
                          "bytes": sum(p.stat().st_size for p in artifact_at(path).files()),
                          "ships": all(r["passed"] for r in results), "results": results})
    return {"gates": str(gates.file), "passed": all(a["ships"] for a in artifacts), "artifacts": artifacts,
            "allow_estimates": gates.allow_estimates, "context": gates.context, "prompt": gates.prompt,
            "signed": {"by": _user(), "host": platform.node(), "at": datetime.now(UTC).isoformat(timespec="seconds"),
                       "versions": versions()}}


def check_summary(path: Path, gates: Gates) -> None:
    """Raise UserError unless the summary can be written at `path`: nothing is there, or an earlier summary."""
    check_place(path, [gates])
    if path.exists() and not {"gates", "passed", "artifacts", "signed"} <= read_json(path).keys():
        raise UserError(f"{path} is there already and is no summary of llmc ship", "choose another name with -o")


def _check_identity(path: Path, digest: str, reports: dict[str, Report]) -> None:
    """Raise UserError if the file changed since it was measured: the report with its name has another sha256."""
    for known, r in reports.items():
        if r["artifact"]["name"] == path.name and known != digest and digest not in reports:
            raise UserError(f"{path} has sha256 {digest[:12]}…, but the report of {path.name} has {known[:12]}…",
                            "the file changed since it was measured: measure it again")


def measure_missing(gates: Gates, path: Path, digest: str, report: Report | None) -> Report | None:
    """Measure what the gates need and `report` lacks: KL divergence from `base`, and speed on each target.

    Returns the merged report. It is saved in NAME.report.json beside the gates file and is not measured again.
    """
    from llmc.evals.bench.run import bench
    from llmc.evals.quality.run import evaluate
    from llmc.runtimes.targets.target import load_targets

    wanted = {limit for limits in gates.targets.values() for limit in limits}
    kept = gates.file.with_name(f"{path.name}.report.json")
    earlier = read_report(kept) if kept.is_file() else None
    current = report
    if earlier and earlier["artifact"]["sha256"] == digest:
        current = merged(earlier, report) if report else earlier
    if wanted & QUALITY and not quality_of(current):
        if gates.base is None:
            raise UserError(f"{path.name} was not evaluated and {gates.file} has no base", "add `base: MODEL`, or a report")
        current = merged(current, evaluate(EvalConfig(str(path), base=gates.base, **gates.eval)))
        save(kept, current)
    known = load_targets(gates.targets_file)
    for target, limits in gates.targets.items():
        speed = {"min_decode", "max_first_token", "stable"} & set(limits)
        if speed and target not in speeds_of(current) and target in known and not known[target].emulated:
            current = merged(current, bench(BenchConfig((str(path),), prompt=(gates.prompt,), target=(target,),
                                                        targets=gates.targets_file))[0])
            save(kept, current)
    return current


def _on_target(gates: Gates, path: Path, report: Report | None, baseline: Report | None, target: str,
               limits: dict[str, Any]) -> list[Verdict]:
    """The results of one artifact on one target, one for each limit."""
    given: dict[str, Any] = {k: float(v) if k in NUMBERS else str(v) for k, v in limits.items() if k in LIMITS}
    config = FitConfig((path,), (target,), context=gates.context, prompt=gates.prompt, targets=gates.targets_file, **given)
    alone = fits.candidate(path)
    c = fits.Candidate(path.name, report, alone.model)
    rates = fits.LazyRates(lambda: fits.rates_for(target, [c], gates.targets_file))
    asked = fits.limits_of(config)
    judged = fits.judge(c, target, rates, asked, config, gates.allow_estimates)
    results = [_result(target, name, judged["figures"][name], gates) for name in asked]
    if "max_ppl_increase" in limits:
        results.append(_perplexity(target, str(limits["max_ppl_increase"]), report, baseline))
    if limits.get("stable"):
        results.append(_stable(target, report))
    return results


def _result(target: str, name: Name, figure: JudgedFigure, gates: Gates) -> Verdict:
    """The result of a gate. Only the answer `yes` passes. An estimate passes only if the gates file allows estimates."""
    source = figure.get("source")
    passed = figure["answer"] == "yes" and (source == "measured" or gates.allow_estimates)
    why = {"yes": "", "no": "the limit is missed", "unknown": "not measured", "maybe": UNDECIDED}[figure["answer"]]
    if figure["answer"] == "maybe" and "UNSTABLE" in figure["note"]:
        why = "not decided: the speed is unstable"
    if figure["answer"] == "yes" and not passed:
        why = "only an estimate, and the gates file does not allow estimates"
    if figure["answer"] == "unknown" and name in ("decode", "first_token"):
        why = f"not measured on {target}" + ("" if gates.allow_estimates else " (an estimate is not allowed)")
    return {"target": target, "gate": name, "limit": figure["limit"], "source": source,
            "answer": figure["answer"], "passed": passed, "why": why,
            "figure": {"low": figure["low"], "mid": figure["mid"], "high": figure["high"], "note": figure["note"]}
            if "mid" in figure else None}


def _perplexity(target: str, limit: str, report: Report | None, baseline: Report | None) -> Verdict:
    """The result of max_ppl_increase: the increase over the first report's artifact on the worst text, paired by token."""
    most = parse_number("max_ppl_increase", limit.replace(" %", "%"), "%", "max_ppl_increase: 5%") / 100
    found = None
    if report and baseline and quality_of(report) and quality_of(baseline):
        check_comparable([baseline, report])
        found = differences(baseline, report)["texts"]
    if found is None:
        return {"target": target, "gate": "ppl_increase", "limit": most, "source": None, "figure": None, "answer": "unknown",
                "passed": False, "why": "not measured for both this artifact and the first report's"}
    worst = max((t["perplexity_ratio"] for t in found), key=lambda r: r["value"])
    low, value, high = interval = around(worst, less=1.0)
    answer = meets(interval, most, most=True)
    return {"target": target, "gate": "ppl_increase", "limit": most, "source": "measured",
            "figure": {"low": low, "mid": value, "high": high, "note": ""}, "answer": answer, "passed": answer == "yes",
            "why": {"yes": "", "maybe": UNDECIDED}.get(answer, "the limit is missed")}


def _stable(target: str, report: Report | None) -> Verdict:
    section = speeds_of(report).get(target)
    doubts = (section["unstable"] if not section["target"]["emulated"] else ["emulated"]) if section else [
        f"not measured on {target}"]
    return {"target": target, "gate": "stable", "limit": True, "figure": None, "source": "measured" if section else None,
            "answer": "no" if doubts and section else "unknown" if doubts else "yes", "passed": not doubts,
            "why": "; ".join(doubts)}


def _user() -> str:
    """Name of the user, or 'unknown': in a container a user may have no name."""
    try:
        return getpass.getuser()
    except (ImportError, KeyError, OSError):  # ImportError: Windows without USERNAME
        return "unknown"
