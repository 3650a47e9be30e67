"""The plan of a run: which jobs are cached, which will run, and the time, memory and disk that they need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmc.console import duration, size
from llmc.errors import UserError
from llmc.recipes.estimate import Times, own_plan
from llmc.recipes.identity import Hashes
from llmc.recipes.jobs import Job, is_done, may_resume, weight_bytes

CACHED, RUN, RESUME, UNUSED = "cached", "run", "resume", "not needed"


def states(jobs: dict[str, Job], hashes: Hashes) -> dict[str, tuple[str, str]]:
    """{job: (state, reason)}. A model that was deleted is not needed if the models made from it exist and nothing else has
    to read it. The same holds for a report and its comparisons. A job that runs needs all its inputs."""
    done = {job.id: is_done(job, hashes) for job in jobs.values()}
    found: dict[str, tuple[str, str]] = {}
    for job in reversed(jobs.values()):
        users = [j for j in jobs.values() if job.id in (*j.inputs, j.teacher)]
        successors = [j for j in users if j.step.typed.command.makes_model] if job.step.typed.command.makes_model else users
        exists, why = done[job.id]
        if exists:
            found[job.id] = (CACHED, "")
        elif successors and all(found[u.id][0] in (CACHED, UNUSED) for u in users):
            found[job.id] = (UNUSED, why or "the results made from it exist")
        else:
            found[job.id] = (RESUME if job.step.typed.command.resumes and not why and may_resume(job) else RUN, why)
    return {i: found[i] for i in jobs}


def plan(jobs: dict[str, Job], base: str, state: dict[str, tuple[str, str]]) -> list[dict[str, Any]]:
    """A row for each job: {job, command, from, state, why, seconds, memory_bytes, disk_bytes}; unknown values are None.

    seconds: measured for a cached job, else estimated from earlier steps of the kind. Raises UserError with all problems
    that the steps' own plans find.
    """
    times, length = Times(), base_bytes(base)
    rows, problems = [], []
    for job in jobs.values():
        row: dict[str, Any] = {"job": job.id, "command": job.step.command, "from": list(job.inputs),
                               "teacher": job.teacher, "state": state[job.id][0], "why": state[job.id][1],
                               "seconds": None, "memory_bytes": None, "disk_bytes": None}
        if row["state"] in (CACHED, UNUSED):
            row["seconds"] = (job.record() or {}).get("seconds")
        else:
            source = jobs.get(job.inputs[0]) if job.inputs else None
            exists = source is None or state[source.id][0] == CACHED
            row |= {"seconds": times.seconds(job, length), "disk_bytes": times.disk(job, length)}
            try:
                row |= own_plan(job, base if source is None or not exists else source.artifact, base, exists)
            except UserError as e:
                problems.append(f"step {job.id}: {e.problem}" + (f" ({e.hint})" if e.hint else ""))
        rows.append(row)
    if problems:
        raise UserError("\n  ".join(problems), "nothing was run")
    return rows


def base_bytes(base: str) -> int:
    """Bytes of the base's weights."""
    path = Path(base)
    if not path.exists():
        from llmc.sources.resolve import resolve_model

        path = resolve_model(base)
    return weight_bytes(path)


def lines(rows: list[dict[str, Any]]) -> str:
    """The plan as text."""
    from llmc.evals.report.show import table

    table_rows = [["step", "from", "", "time", "memory", "disk"]]
    for r in rows:
        about = "~" if r["state"] in (RUN, RESUME) else ""
        source = ", ".join(r["from"]) + (f" (teacher {Path(r['teacher']).name})" if r["teacher"] else "")
        table_rows.append([r["job"], source, r["state"] + (f": {r['why']}" if r["why"] else ""),
                     "-" if r["seconds"] is None else about + duration(r["seconds"]),
                     *("-" if r[k] is None else about + size(r[k]) for k in ("memory_bytes", "disk_bytes"))])
    todo = [r for r in rows if r["state"] in (RUN, RESUME)]
    known = [r["seconds"] for r in todo if r["seconds"] is not None]
    total = f"{len(todo)} of {len(rows)} steps to run"
    if known:
        total += f", about {duration(sum(known))}" + (f" and {len(todo) - len(known)} of unknown time"
                                                      if len(known) < len(todo) else "")
    elif todo:
        total += "; times are estimated after such steps have run in this working folder"
    return f"{table(table_rows)}\n{total}"
