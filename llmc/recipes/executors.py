"""Run the jobs of a sweep: one after another on this machine, or on a Ray cluster.

If a job fails with a UserError (too little text, full disk), the jobs that need its result fail too. Other jobs continue.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from llmc.console import say, warn
from llmc.errors import UserError
from llmc.recipes.chain import Chain
from llmc.recipes.jobs import Job
from llmc.recipes.run import record_time, run_job

Owners = Mapping[str, tuple[Mapping[str, Job], Chain]]
"""{job: (jobs, chain) of the variant that it is run for}."""


def local(todo: dict[str, Job], owners: Owners) -> dict[str, str]:
    """Run the jobs on this machine. Returns {job: error} of those that failed."""
    failed: dict[str, str] = {}
    for number, (label, job) in enumerate(todo.items(), 1):
        if errors := [failed[i] for i in (*job.inputs, job.teacher) if i in failed]:
            failed[label] = errors[0]
            continue
        say(f"\n[{number}/{len(todo)}] {label}")
        own, chain = owners[label]
        try:
            job = _own(label, own)
            record_time(job, chain, run_job(job, own, chain))
        except UserError as e:
            warn(f"{label} failed: {e.problem}")
            failed[label] = e.problem
    return failed


def _own(label: str, jobs: Mapping[str, Job]) -> Job:
    """The job with the ids of its variant."""
    return next(j for j in jobs.values() if j.folder.name == label)


def on_ray(todo: dict[str, Job], owners: Owners) -> dict[str, str]:
    """Like `local`, on the cluster of RAY_ADDRESS or on a new one on this machine. Every node must see the run folder and
    the model under the same paths. A job waits for its inputs. A bench job has a node to itself."""
    try:
        import ray
    except ModuleNotFoundError as e:
        raise UserError("--executor ray needs the package ray", "pip install 'llmc-toolkit[ray]'") from e
    starts_ray = not ray.is_initialized()
    if starts_ray:
        ray.init(address=os.environ.get("RAY_ADDRESS"), include_dashboard=False)
    try:
        cores = min(int(n["Resources"].get("CPU", 1)) for n in ray.nodes() if n["Alive"])
        remote = ray.remote(max_retries=0)(_remotely)
        refs: dict[str, Any] = {}
        for label, job in todo.items():
            needs = [refs[i] for i in (*job.inputs, job.teacher) if i in refs]
            own, chain = owners[label]
            threads = job.step.typed.options().get("threads")
            cpus = cores if job.step.command == "bench" or threads is None else min(cores, threads)
            jobs = {i: replace(j, folder=j.folder.absolute()) for i, j in own.items()}
            refs[label] = remote.options(num_cpus=cpus, name=label).remote(label, jobs, chain, *needs)
        results = dict(zip(refs, ray.get(list(refs.values())), strict=True))
    finally:
        if starts_ray:
            ray.shutdown()
    for label, (error, record) in results.items():
        own, chain = owners[label]
        if error:
            warn(f"{label} failed: {error}")
        elif record:
            record_time(_own(label, own), chain, record)
    return {label: error for label, (error, _) in results.items() if error}


def _remotely(label: str, jobs: dict[str, Job], chain: Chain, *inputs: tuple[str, Any]) -> tuple[str, Any]:
    """Run one job in a worker. Returns ('', its record) or (error, None). inputs: such results of the jobs that it needs.

    Commands write notes into the working folder, so each job has a working folder of its own.
    """
    if errors := [error for error, _ in inputs if error]:
        return errors[0], None
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        try:
            return "", run_job(_own(label, jobs), jobs, chain)
        except UserError as e:
            return e.problem, None


EXECUTORS: dict[str, Callable[[dict[str, Job], Owners], dict[str, str]]] = {"local": local, "ray": on_ray}
