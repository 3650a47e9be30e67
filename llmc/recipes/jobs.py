"""The jobs of a chain: the units that are run once and cached. A step is one job; an eval step is one job per artifact.

A run folder holds a folder for each job, named by step and key. It has the artifact, `.started.json` while the job runs,
and `.done.json`, which is written last: time taken, and size, modification time and sha256 of each file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmc.errors import UserError
from llmc.export.formats import FORMATS
from llmc.files import read_note, sha256
from llmc.formats.artifacts.table import artifact_at
from llmc.formats.manifest import manifest_path, read_manifest, versions
from llmc.places import check_place, real
from llmc.recipes.chain import Chain, Step
from llmc.recipes.commands import PAGE, REPORT
from llmc.recipes.identity import Hashes, key, model_digest
from llmc.recipes.recipe import BASE
from llmc.temporary import remove, restore

SCHEMA = 1
DONE, STARTED, MARK, HASHES = ".done.json", ".started.json", ".run.json", ".hashes.json"  # a step's name has no leading dot


@dataclass(frozen=True)
class Job:
    """id: 'quantize', or 'eval small' for the artifact `small`.  inputs: ids of jobs, or 'base'; for compare, the jobs that
    measured.  target: the artifact that an eval job evaluates."""

    id: str
    step: Step
    inputs: tuple[str, ...]
    teacher: str | None
    key: str
    folder: Path
    target: str | None = None

    @property
    def artifact(self) -> Path:
        """The path of the result: a folder, a file, or the folder of the reports."""
        kind, name = self.step.kind, self.step.name
        name = "compare.json" if kind == PAGE else name + FORMATS[kind].suffix if kind in FORMATS else name
        return self.folder if self.step.kind == REPORT else self.folder / name

    def report(self, target: str) -> Path:
        """The path of the report of `target` that an eval or bench job writes."""
        return self.folder / f"{target}.json"

    def record(self) -> dict[str, Any] | None:
        """`.done.json`, or None while the job is not done."""
        found = read_note(self.folder / DONE)
        return found if found.get("schema") == SCHEMA and found.get("key") == self.key else None


def open_folder(folder: Path, base: str | None = None) -> Hashes:
    """The hashes of a run folder, which may be new. Raises UserError if it has other contents or is in the model `base`."""
    if not (folder / MARK).is_file():
        if any(folder.iterdir()) if folder.is_dir() else folder.exists():
            raise UserError(f"{folder} exists and is not the folder of a recipe run", "choose another folder with -o")
        check_place(real(folder), (base,), folder=True)
    return Hashes(folder / HASHES)


def jobs_of(chain: Chain, folder: Path, hashes: Hashes) -> dict[str, Job]:
    """The jobs of a chain by id, in an order in which they can run."""
    base = model_digest(chain.base, hashes)
    keys, jobs = {BASE: base}, {}

    def add(job: Job, given: list[str]) -> None:
        teacher = None if job.teacher is None else keys.get(job.teacher) or model_digest(job.teacher, hashes)
        made = key(job.step, given, teacher, base, hashes)
        label = job.step.name + (f"-{job.target}" if job.target else "")
        keys[job.id] = made
        jobs[job.id] = replace(job, key=made, folder=folder / f"{label}-{made[:12]}")

    for step in chain.steps:
        if step.command == "eval":
            for target in step.inputs:
                add(Job(f"{step.name} {target}", step, (target,), None, "", folder, target), [keys[target]])
        elif step.kind == PAGE:
            ids = tuple(measuring(step, chain, target, name) for target, names in zip(step.inputs, step.reports, strict=True)
                        for name in names)
            unique = tuple(dict.fromkeys(ids))
            add(Job(step.name, step, unique, None, "", folder), [*step.inputs, *(keys[i] for i in unique)])
        else:
            add(Job(step.name, step, step.inputs, step.teacher, "", folder), [keys[n] for n in step.inputs])
    return jobs


def measuring(step: Step, chain: Chain, target: str, name: str) -> str:
    """The id of the job in which the step `name` measured `target`."""
    return f"{name} {target}" if chain.step(name).command == "eval" else name


def is_done(job: Job, hashes: Hashes) -> tuple[bool, str]:
    """Whether a job's result exists unchanged, and if not, why ('' if it was never made)."""
    record = job.record()
    if record is None:
        return False, ""
    for name, (length, changed, sha) in record["files"].items():
        path = job.folder / name
        if not path.is_file():
            return False, f"{name} is missing"
        stat = path.stat()
        # a file of another length has another hash: no need to read what may be very long
        if stat.st_size != length or (stat.st_mtime_ns != changed and hashes.of(path) != sha):
            return False, f"{name} was changed since it was made"
    return True, ""


def finished_but_unrecorded(job: Job) -> bool:
    """Whether the artifact is complete, but the run was killed before it wrote `.done.json`. The artifact is then kept."""
    if job.step.kind in (REPORT, PAGE) or not (job.folder / STARTED).is_file():
        return False
    restore(job.artifact)
    if not job.artifact.exists() or not manifest_path(job.artifact).is_file() or not may_resume(job):
        return False
    known = (read_manifest(job.artifact) or {}).get("outputs", {})  # the manifest of a file gets its name before the file
    return job.artifact.is_dir() or known == {job.artifact.name: sha256(job.artifact)}


def may_resume(job: Job) -> bool:
    """Whether an interrupted job can continue. It needs the versions of libraries that it started with."""
    return read_note(job.folder / STARTED) == started(job)


def started(job: Job) -> dict[str, Any]:
    """The content of `.started.json`."""
    return {"key": job.key, "versions": versions()}


def files_of(job: Job) -> dict[str, list[Any]]:
    """{file: [bytes, modification time in ns, sha256 (from the manifest if it has it)]} of a finished job."""
    known = (read_manifest(job.artifact) or {}).get("outputs", {}) if job.artifact.exists() else {}
    root = job.artifact if job.artifact.is_dir() else job.folder
    found = {}
    for path in sorted(p for p in job.folder.rglob("*") if p.is_file() and p.name not in (DONE, STARTED)):
        stat = path.stat()
        inner = path.relative_to(root).as_posix() if path.is_relative_to(root) else ""
        found[path.relative_to(job.folder).as_posix()] = [stat.st_size, stat.st_mtime_ns, known.get(inner) or sha256(path)]
    return found


def weight_bytes(path: Path) -> int:
    """Bytes of the files that hold the weights of a model."""
    return sum(p.stat().st_size for p in artifact_at(path).weight_files())


def clear(job: Job) -> None:
    """Remove what a job left."""
    remove(job.folder)
