"""`llmc run`: run the jobs of a recipe that are not cached."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmc import api
from llmc.console import duration, say
from llmc.errors import UserError
from llmc.files import write_json, writing
from llmc.locks import locked
from llmc.recipes import report
from llmc.recipes.chain import Chain, load
from llmc.recipes.commands import PAGE, REPORT
from llmc.recipes.config import RunConfig
from llmc.recipes.estimate import Times
from llmc.recipes.jobs import (
    DONE,
    MARK,
    SCHEMA,
    STARTED,
    Job,
    clear,
    files_of,
    finished_but_unrecorded,
    jobs_of,
    may_resume,
    open_folder,
    started,
    weight_bytes,
)
from llmc.recipes.plan import RESUME, RUN, base_bytes, lines, plan, states
from llmc.recipes.recipe import BASE, setting
from llmc.recipes.schema import Plan, RunReport


def run_recipe(recipe: str | Path, config: RunConfig) -> RunReport | Plan:
    """Run the jobs that are not cached, and return the report; with `dry_run` return the plan.

    Raises UserError with all problems at once, before a weight is read. A missed gate raises no error: read 'passed'.
    """
    chain = load(recipe, config.model, dict(setting(s) for s in config.set))
    folder = config.out or Path(chain.recipe.name)
    hashes = open_folder(folder, chain.base)
    jobs = jobs_of(chain, folder, hashes)
    if config.dry_run:
        return {"recipe": chain.recipe.name, "folder": str(folder), "plan": plan(jobs, chain.base, states(jobs, hashes))}
    with used(folder):
        state = states(jobs, hashes)  # not before: another run may just have finished some
        hashes.save()
        todo = [j for j in jobs.values() if state[j.id][0] in (RUN, RESUME)]
        if todo:
            say(lines(plan(jobs, chain.base, state)))
        ran = []
        for number, job in enumerate(todo, 1):
            say(f"\n[{number}/{len(todo)}] {job.id}")
            record_time(job, chain, run_job(job, jobs, chain))
            ran.append(job.id)
        return report.write(chain, jobs, folder, ran)


@contextmanager
def used(folder: Path) -> Iterator[None]:
    """Mark a folder as a run folder and lock it for this process. UserError if another run uses it."""
    mark = folder / MARK
    with writing(mark):
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()  # first: a folder with other files and without it is not taken for a run folder
    with locked(folder, inside=True):
        if not mark.stat().st_size:
            write_json(mark, {"kind": "llmc-run", "schema": SCHEMA})
        yield


def run_job(job: Job, jobs: Mapping[str, Job], chain: Chain) -> dict[str, Any]:
    """Run one job, write its `.done.json`, and return the record in it."""
    seconds, resumed = None, may_resume(job)
    if finished_but_unrecorded(job):
        say(f"{job.artifact} is complete already")
    else:
        if not resumed or not job.step.typed.command.resumes or (job.folder / DONE).exists():
            clear(job)
        job.folder.mkdir(parents=True, exist_ok=True)
        write_json(job.folder / STARTED, started(job))
        begun = time.monotonic()
        try:
            call_command(job, jobs, chain)
        except UserError as e:
            raise type(e)(f"step {job.id}: {e.problem}", e.hint) from e
        seconds = round(time.monotonic() - begun, 1)
    files = files_of(job)
    left = sum(n for n, *_ in files.values())
    made = weight_bytes(job.artifact) if job.step.typed.command.makes_model else left
    record = {"schema": SCHEMA, "key": job.key, "job": job.id, "seconds": seconds, "resumed": resumed, "bytes": made,
              "left": left, "files": files}
    write_json(job.folder / DONE, record)
    (job.folder / STARTED).unlink()
    return record


def record_time(job: Job, chain: Chain, record: dict[str, Any]) -> None:
    """Print the time of a job, and keep it for estimates if the job ran from start to end."""
    if record["seconds"] is not None:
        say(f"{job.id}: {duration(record['seconds'])}")
        if not record["resumed"]:
            Times().note(job, base_bytes(chain.base), max(record["seconds"], 0.1), record["left"])


def call_command(job: Job, jobs: Mapping[str, Job], chain: Chain) -> None:
    """Call the Python function of the job's command."""
    def place(name: str) -> str:
        return chain.base if name == BASE else str(jobs[name].artifact) if name in jobs else name

    step, options = job.step, job.step.typed.options()
    function = getattr(api, step.typed.command.function)
    if step.kind == PAGE:
        result = function(*distinct_reports(step, jobs, chain), page=job.folder / "compare.html", **options)
        write_json(job.artifact, result)
    elif step.command == "bench":
        function(*map(place, job.inputs), out=[job.report(n) for n in job.inputs], **options)
    elif step.kind == REPORT:
        assert job.target is not None
        function(place(job.target), base=chain.base, out=job.report(job.target), **options)
    else:
        more: dict[str, Any] = {"teacher": place(job.teacher)} if job.teacher else {}
        if step.typed.command.resumes:
            more["resume"] = True
        if step.typed.format:
            more["format"] = step.typed.format
        function(place(job.inputs[0]), out=job.artifact, **more, **options)


def distinct_reports(step: Any, jobs: Mapping[str, Job], chain: Chain) -> list[Path]:
    """The report files of a compare step. If two artifacts have the same bytes (healing found nothing better), the later
    one is left out, and a message says so."""
    files: list[Path] = []
    seen: dict[str, str] = {}
    for target, paths in report.measured(step, jobs, chain).items():
        sha = json.loads(paths[0].read_text(encoding="utf-8"))["artifact"]["sha256"]
        if sha in seen:
            say(f"{target} has the same bytes as {seen[sha]}: it is not compared twice")
            continue
        seen[sha] = target
        files += paths
    return files
