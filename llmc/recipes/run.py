"""`llmc run`: the jobs of a recipe, each once."""

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
    adopted,
    clear,
    files_of,
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
    """Run what is not there yet, and return the chain's report; with `dry_run` the plan.

    Raises UserError, with every problem at once, before a weight is read. A missed gate raises nothing: look at 'passed'.
    """
    chain = load(recipe, config.model, dict(setting(s) for s in config.set))
    folder = config.out or Path(chain.recipe.name)
    hashes = open_folder(folder, chain.base)
    jobs = jobs_of(chain, folder, hashes)
    if config.dry_run:
        return {"recipe": chain.recipe.name, "folder": str(folder), "plan": plan(jobs, chain.base, states(jobs, hashes))}
    with locked(folder):
        state = states(jobs, hashes)  # not before: another run may just have finished some
        hashes.save()
        todo = [j for j in jobs.values() if state[j.id][0] in (RUN, RESUME)]
        if todo:
            say(lines(plan(jobs, chain.base, state)))
        ran = []
        for number, job in enumerate(todo, 1):
            say(f"\n[{number}/{len(todo)}] {job.id}")
            remember(job, chain, do(job, jobs, chain))
            ran.append(job.id)
        return report.write(chain, jobs, folder, ran)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The run folder for this process alone (where the system has flock)."""
    mark = folder / MARK
    with writing(mark):
        folder.mkdir(parents=True, exist_ok=True)
        f = mark.open("ab")  # the file stays the same: a lock on one that is replaced would keep nobody out
    with f:
        try:
            import fcntl
        except ImportError:  # Windows
            pass
        else:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                raise UserError(f"another run is using {folder}", "wait for it, or choose another folder with -o") from e
        if not mark.stat().st_size:
            f.write((json.dumps({"kind": "llmc-run", "schema": SCHEMA}, indent=2, sort_keys=True) + "\n").encode())
            f.flush()
        yield


def do(job: Job, jobs: Mapping[str, Job], chain: Chain) -> dict[str, Any]:
    """Make one job's artifact, note that it is done, and return the note."""
    seconds, resumed = None, may_resume(job)
    if adopted(job):
        say(f"{job.artifact} is finished")
    else:
        if not resumed or not job.step.typed.command.resumes or (job.folder / DONE).exists():
            clear(job)
        job.folder.mkdir(parents=True, exist_ok=True)
        write_json(job.folder / STARTED, started(job))
        begun = time.monotonic()
        try:
            call(job, jobs, chain)
        except UserError as e:
            raise type(e)(f"step {job.id}: {e.problem}", e.hint) from e
        seconds = round(time.monotonic() - begun, 1)
    files = files_of(job)
    left = sum(n for n, *_ in files.values())
    made = weight_bytes(job.artifact) if job.step.typed.command.makes_model else left
    note = {"schema": SCHEMA, "key": job.key, "job": job.id, "seconds": seconds, "resumed": resumed, "bytes": made,
            "left": left, "files": files}
    write_json(job.folder / DONE, note)
    (job.folder / STARTED).unlink()
    return note


def remember(job: Job, chain: Chain, note: dict[str, Any]) -> None:
    """Say how long a job took, and keep it for estimates if it was run from start to end."""
    if note["seconds"] is not None:
        say(f"{job.id}: {duration(note['seconds'])}")
        if not note["resumed"]:
            Times().note(job, base_bytes(chain.base), max(note["seconds"], 0.1), note["left"])


def call(job: Job, jobs: Mapping[str, Job], chain: Chain) -> None:
    """The command itself, by its Python function."""
    def place(name: str) -> str:
        return chain.base if name == BASE else str(jobs[name].artifact) if name in jobs else name

    step, options = job.step, job.step.typed.options()
    function = getattr(api, step.typed.command.function)
    if step.kind == PAGE:
        result = function(*unequal(step, jobs, chain), page=job.folder / "compare.html", **options)
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


def unequal(step: Any, jobs: Mapping[str, Job], chain: Chain) -> list[Path]:
    """The report files of a compare step. Of two artifacts with the same bytes (healing that found nothing better), which
    have one report, the later is left out, and that is said."""
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
