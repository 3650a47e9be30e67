"""The report of a recipe run as JSON, Markdown and HTML, built from the files that the steps wrote.

schema.py describes its content. The figures come from the reports of the steps.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from llmc.console import warn
from llmc.errors import UserError
from llmc.evals.compare.schema import Comparison
from llmc.files import staged_file, write_json
from llmc.formats.manifest import read_manifest, versions
from llmc.recipes.chain import Chain, Step
from llmc.recipes.commands import PAGE, REPORT
from llmc.recipes.jobs import Job, measuring, weight_bytes
from llmc.recipes.recipe import BASE
from llmc.recipes.schema import ComparisonFacts, Provenance, RecipeFacts, RunArtifact, RunReport, StepReport
from llmc.small_files import LARGE, read_json_object
from llmc.typed_dicts import differences

SCHEMA = 1
KIND = "llmc-recipe-report"


def write(chain: Chain, jobs: Mapping[str, Job], folder: Path, ran: list[str]) -> RunReport:
    """The report of a finished chain, with 'ran', the jobs of this run. It is written only if something changed."""
    place = folder / f"{chain.recipe.name}.json"
    pages = [place.with_suffix(s) for s in (".html", ".md")]
    before = read(place)
    if not ran and before and before["recipe"] == described(chain, jobs) and all(p.is_file() for p in pages):
        return {**before, "ran": []}
    made = build(chain, jobs, folder)
    from llmc.recipes.page import markdown, page

    for path, text in zip(pages, (page(made, folder), markdown(made)), strict=True):
        with staged_file(path) as tmp:
            tmp.write_text(text, encoding="utf-8")
    write_json(place, made)
    return {**made, "ran": ran}


def read(path: Path) -> RunReport | None:
    """The report of an earlier run; None if there is none or this version cannot read it."""
    if not os.path.lexists(path):
        return None
    try:
        found = read_json_object(path, LARGE)
    except UserError as e:
        warn(f"{e.problem}: it is written again")
        return None
    return None if differences(found, RunReport) else cast(RunReport, found)


def described(chain: Chain, jobs: Mapping[str, Job]) -> RecipeFacts:
    """The recipe and the keys of its jobs: equal for equal runs."""
    r = chain.recipe
    return {"name": r.name, "about": r.about, "text": r.text, "keys": {i: j.key for i, j in jobs.items()}}


def build(chain: Chain, jobs: Mapping[str, Job], folder: Path) -> RunReport:
    """Build the report from the records, manifests and reports in the run folder."""
    steps = [_step(j) for j in jobs.values()]
    comparisons = [_comparison(j) for j in jobs.values() if j.step.kind == PAGE]
    gates = [g for c in comparisons for g in c["gates"]]
    made = [s for s in chain.steps if s.typed.command.makes_model]
    artifacts = [_base(chain, jobs), *(_artifact(s, chain, jobs) for s in made)]
    return {
        "schema": SCHEMA, "kind": KIND, "recipe": described(chain, jobs), "model": chain.base, "folder": str(folder),
        "steps": steps, "artifacts": artifacts, "comparisons": comparisons, "gates": gates,
        "passed": all(g["passed"] for g in gates), "seconds": sum(s["seconds"] or 0 for s in steps), "versions": versions(),
    }


def _step(job: Job) -> StepReport:
    """The entry of one job: its inputs, its options without the defaults, its result and its time."""
    record = job.record() or {}
    manifest = (read_manifest(job.artifact) or {}) if job.step.typed.command.makes_model and job.artifact.exists() else {}
    last = (manifest.get("passes") or [{}])[-1]
    curve = {k: last[k] for k in ("curve", "losses", "best_step") if k in last}
    step_report: StepReport = {
        "job": job.id, "command": job.step.command, "from": list(job.inputs), "teacher": job.teacher,
        "options": changed_options(job.step), "key": job.key, "artifact": str(job.artifact), "bytes": record.get("bytes"),
        "seconds": record.get("seconds"), "resumed": record.get("resumed", False)}
    if curve:
        step_report["curve"] = curve
    return step_report


def changed_options(step: Step) -> dict[str, Any]:
    """The options of a step that differ from the defaults. Values that JSON cannot hold become text."""
    config = step.typed.config
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    given = {k: v for k, v in step.typed.options().items() if v != defaults[k]}
    found: dict[str, Any] = json.loads(json.dumps(given, default=str))
    return ({"format": step.typed.format} if step.typed.format else {}) | found


def measured(step: Step, jobs: Mapping[str, Job], chain: Chain) -> dict[str, list[Path]]:
    """{artifact: report files} that a compare step reads."""
    return {target: [jobs[measuring(step, chain, target, name)].report(target) for name in names]
            for target, names in zip(step.inputs, step.reports, strict=True)}


def _with_report(artifact: RunArtifact, chain: Chain, jobs: Mapping[str, Job]) -> RunArtifact:
    """Add the newest eval and bench reports of an artifact, merged, if there are any."""
    from llmc.evals.report.store import merged, read_report, without_arrays

    name, joined = artifact["name"], None
    for step in chain.steps:
        if step.kind == REPORT and name in step.inputs:
            path = jobs[measuring(step, chain, name, step.name)].report(name)
            joined = merged(joined, without_arrays(read_report(path)))
    if joined:
        artifact["report"] = joined
    return artifact


def _base(chain: Chain, jobs: Mapping[str, Job]) -> RunArtifact:
    path = Path(chain.base)
    if not path.exists():
        from llmc.sources.resolve import resolve_model

        path = resolve_model(chain.base)
    return _with_report({"name": BASE, "step": None, "kind": "base", "path": str(path), "bytes": weight_bytes(path),
                         "from": None}, chain, jobs)


def _artifact(step: Step, chain: Chain, jobs: Mapping[str, Job]) -> RunArtifact:
    job = jobs[step.name]
    manifest = (read_manifest(job.artifact) or {}) if job.artifact.exists() else {}
    provenance: Provenance = {
        "source": manifest.get("source"), "created": manifest.get("created"), "versions": manifest.get("versions"),
        "passes": [_short_pass(p) for p in manifest.get("passes", [])]}
    return _with_report({"name": step.name, "step": step.command, "kind": step.kind, "path": str(job.artifact),
                         "bytes": (job.record() or {}).get("bytes"), "from": step.inputs[0], "provenance": provenance},
                        chain, jobs)


def _short_pass(pass_entry: dict[str, Any]) -> dict[str, Any]:
    """A pass of a manifest without the data that only programs read."""
    kept = {k: v for k, v in pass_entry.items() if k not in ("layers", "curve", "losses", "plan")}
    if isinstance(text := kept.get("calibration"), dict):
        kept["calibration"] = {k: v for k, v in text.items() if k != "sketch"}
    return kept


def _comparison(job: Job) -> ComparisonFacts:
    result = cast(Comparison, read_json_object(job.artifact, LARGE))  # a job that is done: the file is as it was written
    return {"job": job.id, "page": str(job.folder / "compare.html"), "gates": result["gates"], "passed": result["passed"],
            "baseline": result["baseline"], "artifacts": [a["name"] for a in result["artifacts"]]}
