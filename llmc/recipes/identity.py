"""Who is who: sha256 of what decides a step. Files are hashed once and known again by size and time of change."""

from __future__ import annotations

import hashlib
import json
import time
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from llmc import closure
from llmc.errors import UserError
from llmc.files import read_note, sha256, write_note
from llmc.formats.artifacts.table import artifact_at
from llmc.recipes.chain import Step
from llmc.recipes.commands import REPORT
from llmc.sources.resolve import WHAT_TO_GIVE

YOUNG = 2.0  # seconds: a file changed this lately could change again without its time telling
RUNTIMES = ("torch", "transformers", "llama-cpp-python", "onnxruntime")  # measurements are of these too


class Hashes:
    """sha256 of files, remembered in `memo` by path, size, time of change and inode."""

    def __init__(self, memo: Path) -> None:
        self.memo = memo
        self.known: dict[str, list[Any]] = read_note(memo)
        self.changed = False

    def of(self, path: Path) -> str:
        """sha256 of a file, or of a folder's files by name."""
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.is_file())
            return digest({p.relative_to(path).as_posix(): self.of(p) for p in files})
        stat = path.stat()
        mark = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        name = str(path.absolute())
        if self.known.get(name, [])[:3] != mark:
            self.known[name] = [*mark, sha256(path)]
            self.changed = True
            if time.time() - stat.st_mtime < YOUNG:
                return str(self.known.pop(name)[3])
        return str(self.known[name][3])

    def save(self) -> None:
        if self.changed:
            write_note(self.memo, self.known)
            self.changed = False


def digest(value: Any) -> str:
    """sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def model_digest(model: str, hashes: Hashes) -> str:
    """sha256 of what decides a model: weights, config and tokenizer of a folder, or the .gguf file."""
    path = Path(model).expanduser()
    if not path.exists():
        from llmc.sources.resolve import resolve_model

        path = resolve_model(model)  # a hub id: its snapshot
    found = artifact_at(path)
    if not found.can_start:
        raise UserError(f"{model} is {found.label}, which is made by export and cannot be the start", WHAT_TO_GIVE)
    files = found.source_files()
    if files == [path]:
        return hashes.of(path)
    return digest({p.name: hashes.of(p) for p in files})


def settings(step: Step, hashes: Hashes) -> dict[str, Any]:
    """A step's options as they decide its result: files by what is in them, not by where they lie."""
    values: dict[str, Any] = json.loads(json.dumps(step.typed.options(), default=str))
    values = {k: v for k, v in values.items() if k in deciding(step) - {"targets"}}  # the devices named are told by `key`
    for option, paths in step.typed.files.items():
        if option not in values:
            continue
        values[option] = [str(values[option]) if option == "tasks" else "", *([p.name, hashes.of(p)] for p in paths)]
        if option == "tasks":  # names of tasks, without where their files are
            values[option][0] = [item.partition("=")[0] for t in step.typed.config.tasks for item in t.split(",")]
        elif option == "calibration" and isinstance(step.typed.config.calibration, tuple):
            files = {str(p) for p in paths}
            values[option][0] = [c for c in step.typed.config.calibration if c not in files]
    return values


def deciding(step: Step) -> set[str]:
    """The options that decide the result, by what the command says itself where it does: rounding reads no text."""
    config = step.typed.config
    if not hasattr(config, "numbers"):
        return set(step.typed.options())
    unread = {"calibration", "samples", "seq_len"} if step.command == "transform" and not config.calibrated else set()
    return (set(config.numbers()) | {"heal", "device", "threads"}) - unread


def key(step: Step, inputs: list[str], teacher: str | None, base: str, hashes: Hashes) -> str:
    """The key of a unit of work: the same key, the same result. inputs, teacher, base: keys or digests of these."""
    made: dict[str, Any] = {
        "command": step.command, "format": step.typed.format, "name": step.name, "options": settings(step, hashes),
        "inputs": inputs, "teacher": teacher, "code": closure.digest(*step.typed.command.code),
        "version": version("llmc-toolkit"),
    }
    if step.kind == REPORT:
        made |= {"base": base if step.command == "eval" else None, "runtimes": {n: version(n) for n in RUNTIMES}}
        if step.command == "bench":
            from llmc.machine import cpu_model, physical_cores

            made["machine"] = [cpu_model(), physical_cores()]
        c = step.typed.config
        if c.target:
            names = [c.target] if isinstance(c.target, str) else c.target
            made["targets"] = [_device(name, c.targets) for name in names]
    return digest(made)


def _device(name: str, file: Path | None) -> dict[str, Any]:
    """A target by where it is and what it is: another device of its name is measured anew."""
    from llmc.runtimes.targets.target import find_target

    target = find_target(name, file).as_dict()
    facts = {k: target["facts"].get(k) for k in ("machine", "cpu", "usable_cores", "memory")}  # a probe finds the rest anew
    return target | {"facts": facts}


@cache
def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
