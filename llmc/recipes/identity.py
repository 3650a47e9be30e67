"""Cache keys of steps: sha256 of everything that affects the result. A file is hashed again only if size or time changed."""

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

RECENT = 2.0  # seconds: a file as new as this could change again and keep its modification time
RUNTIMES = ("torch", "transformers", "llama-cpp-python", "onnxruntime")  # their versions affect measurements


class Hashes:
    """sha256 of files, cached in `memo` by path, size, modification time and inode."""

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
            if time.time() - stat.st_mtime < RECENT:
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
    """sha256 of a model: of the weights, config and tokenizer of a folder, or of the .gguf file."""
    path = Path(model).expanduser()
    if not path.exists():
        from llmc.sources.resolve import resolve_model

        path = resolve_model(model)  # the snapshot of a hub id
    found = artifact_at(path)
    if not found.can_start:
        raise UserError(f"{model} is {found.label}, which is made by export and cannot be the base", WHAT_TO_GIVE)
    files = found.source_files()
    if files == [path]:
        return hashes.of(path)
    return digest({p.name: hashes.of(p) for p in files})


def settings(step: Step, hashes: Hashes) -> dict[str, Any]:
    """The options that affect a step's result. Files count by content, not by path."""
    values: dict[str, Any] = json.loads(json.dumps(step.typed.options(), default=str))
    values = {k: v for k, v in values.items() if k in deciding(step) - {"targets"}}  # `key` adds the devices
    for option, paths in step.typed.files.items():
        if option not in values:
            continue
        values[option] = [str(values[option]) if option == "tasks" else "", *([p.name, hashes.of(p)] for p in paths)]
        if option == "tasks":  # names of tasks, without the paths of their files
            values[option][0] = [item.partition("=")[0] for t in step.typed.config.tasks for item in t.split(",")]
        elif option == "calibration" and isinstance(step.typed.config.calibration, tuple):
            files = {str(p) for p in paths}
            values[option][0] = [c for c in step.typed.config.calibration if c not in files]
    return values


def deciding(step: Step) -> set[str]:
    """The options that affect the result. A config with numbers() decides itself: rtn ignores the calibration options."""
    config = step.typed.config
    if not hasattr(config, "numbers"):
        return set(step.typed.options())
    unread = {"calibration", "samples", "seq_len"} if step.command == "transform" and not config.calibrated else set()
    return (set(config.numbers()) | {"heal", "device", "threads"}) - unread


def key(step: Step, inputs: list[str], teacher: str | None, base: str, hashes: Hashes) -> str:
    """The cache key of a job. Equal keys mean equal results. inputs, teacher, base: their keys or digests."""
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
    """The address and hardware of a target: another device of the same name is measured again."""
    from llmc.runtimes.targets.target import find_target

    target = find_target(name, file).as_dict()
    facts = {k: target["facts"].get(k) for k in ("machine", "cpu", "usable_cores", "memory")}  # probes change the rest
    return target | {"facts": facts}


@cache
def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
