"""Where the jobs of a sweep run: one after another here, or on a Ray cluster.

A job that fails with a user's error (too little text, no room) takes with it what works on it, not the other variants.
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
from llmc.recipes.run import do, remember

Homes = Mapping[str, tuple[Mapping[str, Job], Chain]]
"""Of each job the variant that it is run for: its jobs and its chain."""


def local(todo: dict[str, Job], homes: Homes) -> dict[str, str]:
    """{job: why it failed}, of all that could not be done."""
    failed: dict[str, str] = {}
    for number, (label, job) in enumerate(todo.items(), 1):
        if lost := [failed[i] for i in (*job.inputs, job.teacher) if i in failed]:
            failed[label] = lost[0]
            continue
        say(f"\n[{number}/{len(todo)}] {label}")
        own, chain = homes[label]
        try:
            job = _own(label, own)
            remember(job, chain, do(job, own, chain))
        except UserError as e:
            warn(f"{label} failed: {e.problem}")
            failed[label] = e.problem
    return failed


def _own(label: str, jobs: Mapping[str, Job]) -> Job:
    """The job as its variant knows it."""
    return next(j for j in jobs.values() if j.folder.name == label)


def on_ray(todo: dict[str, Job], homes: Homes) -> dict[str, str]:
    """The same on the cluster of RAY_ADDRESS, or one on this machine. Every node must see the run folder and the model under
    the same paths. A job waits for those that it works on; bench jobs have their node to themselves."""
    try:
        import ray
    except ModuleNotFoundError as e:
        raise UserError("--executor ray needs the package ray", "pip install 'llmc-toolkit[ray]'") from e
    ours = not ray.is_initialized()
    if ours:
        ray.init(address=os.environ.get("RAY_ADDRESS"), include_dashboard=False)
    try:
        cores = min(int(n["Resources"].get("CPU", 1)) for n in ray.nodes() if n["Alive"])
        remote = ray.remote(max_retries=0)(_remotely)
        refs: dict[str, Any] = {}
        for label, job in todo.items():
            needs = [refs[i] for i in (*job.inputs, job.teacher) if i in refs]
            own, chain = homes[label]
            threads = job.step.typed.options().get("threads")
            cpus = cores if job.step.command == "bench" or threads is None else min(cores, threads)
            there = {i: replace(j, folder=j.folder.absolute()) for i, j in own.items()}
            refs[label] = remote.options(num_cpus=cpus, name=label).remote(label, there, chain, *needs)
        results = dict(zip(refs, ray.get(list(refs.values())), strict=True))
    finally:
        if ours:
            ray.shutdown()
    for label, (why, note) in results.items():
        own, chain = homes[label]
        if why:
            warn(f"{label} failed: {why}")
        elif note:
            remember(_own(label, own), chain, note)
    return {label: why for label, (why, _) in results.items() if why}


def _remotely(label: str, jobs: dict[str, Job], chain: Chain, *before: tuple[str, Any]) -> tuple[str, Any]:
    """One job in a worker: ('', its note), or (why it failed, None). before: the same of the jobs that it works on.

    Commands leave notes in the working folder, so each job has one of its own.
    """
    if lost := [why for why, _ in before if why]:
        return lost[0], None
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        try:
            return "", do(_own(label, jobs), jobs, chain)
        except UserError as e:
            return e.problem, None


EXECUTORS: dict[str, Callable[[dict[str, Job], Homes], dict[str, str]]] = {"local": local, "ray": on_ray}
