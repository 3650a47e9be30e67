"""Targets: devices with a name, in `targets.toml`. The user writes this file, or `llmc target` edits it.

    [targets.pi]
    address = "ssh://user@host:22"

`local-cpu` and `local-gpu` exist without a file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from llmc.errors import UserError
from llmc.small_files import read_toml

FILE = "targets.toml"
LOCAL = ("local-cpu", "local-gpu")
EMULATED = "emulated-arm64"
NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
# Names are separate arguments of ssh and adb, and none may look like an option.
_PART = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
SSH = re.compile(rf"ssh://((?P<user>{_PART})@)?(?P<host>{_PART}|\[[0-9A-Fa-f:.]+\])(:(?P<port>[0-9]{{1,5}}))?")
ADB = re.compile(r"adb:(?P<serial>[A-Za-z0-9][A-Za-z0-9._:-]*)")
JUMP = re.compile(rf"({_PART}@)?({_PART}|\[[0-9A-Fa-f:.]+\])(:[0-9]{{1,5}})?")
KINDS = f"{', '.join(LOCAL)}, ssh://user@host, adb:SERIAL or {EMULATED}"


@dataclass(frozen=True)
class Target:
    """A named device. python: its Python. cache, cache_gb: its folder for artifacts, and the largest size of that, in GB.
    jump: the host to go through (`ssh -J`). profile: the id of a device profile, for estimates.
    facts: the results of `llmc target probe` (runtimes/on_device/facts.py), {} before."""

    name: str
    address: str
    python: str = "python3"
    cache: str = "~/.cache/llmc"
    cache_gb: float = 20
    jump: str | None = None
    profile: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise UserError(f"{self.name!r} is not a valid target name", "use a-z, 0-9, '.', '_' and '-', such as pi5")
        if self.address not in (*LOCAL, EMULATED) and not SSH.fullmatch(self.address) and not ADB.fullmatch(self.address):
            raise UserError(f"target {self.name}: the address {self.address!r} is not known", f"give {KINDS}")
        if self.jump is not None and not JUMP.fullmatch(self.jump):
            raise UserError(f"target {self.name}: jump {self.jump!r} is not [user@]host[:port]", "give user@bastion")
        if self.profile is not None and not NAME.fullmatch(self.profile):
            raise UserError(f"target {self.name}: {self.profile!r} is not a valid profile id",
                            "write it like profile = \"pi5\"")
        for key in ("python", "cache"):
            value = getattr(self, key)
            if not value or value.startswith("-") or not value.isprintable():
                raise UserError(f"target {self.name}: {key} {value!r} is not a path", f"write the path of its {key}")
        if not self.cache_gb > 0:
            raise UserError(f"target {self.name}: cache_gb {self.cache_gb} is out of range: more than 0", "try 20")

    @property
    def emulated(self) -> bool:
        """True if the target is emulated on other hardware, so that its speeds are not those of a device."""
        return self.address == EMULATED

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def label(self) -> str:
        """'pi (ssh://pi5)', or only the name if the address is the same."""
        return self.name if self.name == self.address else f"{self.name} ({self.address})"


OPTIONS = {f.name: str(f.type) for f in fields(Target) if f.name not in ("name", "facts")}


def targets_file(given: Path | None = None) -> Path:
    """The file to read and write: `given`, else ./targets.toml if it exists, else the one in the user's config folder."""
    if given is not None:
        return given
    here = Path(FILE)
    if here.is_file():
        return here
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "llmc" / FILE


def load_targets(given: Path | None = None) -> dict[str, Target]:
    """All targets by name, local ones first. Raises UserError if `given` does not exist or a file is not valid."""
    path = targets_file(given)
    if given is not None and not path.exists():
        raise UserError(f"there is no file {given}", "make it with `llmc target add NAME ADDRESS --targets FILE`")
    found = read_toml(path, "correct it, or name another file with --targets") if path.exists() else {}
    tables = found.get("targets", {})
    if not isinstance(tables, dict) or (odd := sorted(found.keys() - {"targets"})):
        raise UserError(f"{path}: {', '.join(odd) if isinstance(tables, dict) else 'targets'} is not a table of targets",
                        "write [targets.NAME] above the lines of each target")
    local = {name: Target(name, name) for name in LOCAL}
    return local | {name: _read(path, name, table) for name, table in tables.items()}


def _read(path: Path, name: str, table: Any) -> Target:
    """The target in one table of the file; raises UserError for an unknown key or a wrong type."""
    if not isinstance(table, dict) or ("address" not in table and name not in LOCAL):
        raise UserError(f"{path}: target {name} has no address", f"give one: {KINDS}")
    if unknown := sorted(table.keys() - OPTIONS.keys() - {"facts"}):
        raise UserError(f"{path}: target {name} has the unknown keys {', '.join(unknown)}",
                        f"known keys: {', '.join(OPTIONS)}; `llmc target probe` writes facts")
    for key, value in table.items():
        kind = dict if key == "facts" else int | float if key == "cache_gb" else str
        if not isinstance(value, kind) or isinstance(value, bool):
            wanted = "a number" if key == "cache_gb" else "text"
            raise UserError(f"{path}: {key} of target {name} is {value!r}", f"write {wanted}")
    if name in LOCAL and table.get("address", name) != name:
        raise UserError(f"{path}: {name} is this machine, so its address cannot be {table['address']!r}",
                        "choose another name")
    return Target(name, **{"address": name, **table})


def find_target(name: str, given: Path | None = None) -> Target:
    """The target with that name. An address alone (`ssh://pi5`) is not enough, because results are stored by name."""
    known = load_targets(given)
    if name not in known:
        raise UserError(f"there is no target {name!r}; known targets: {', '.join(known)}",
                        f"`llmc target add {name if NAME.fullmatch(name) else 'NAME'} ADDRESS` writes one into "
                        f"{targets_file(given)}")
    return known[name]


def write_target(target: Target, given: Path | None = None) -> Path:
    """Add or replace a target in the file; return the file's path. Comments and other targets do not change."""
    defaults = {f.name: f.default for f in fields(Target)}

    def change(tables: Any) -> None:
        table = tables.setdefault(target.name, {})
        for key, value in asdict(target).items():
            if key == "name" or value in (None, {}) or (key not in table and value == defaults.get(key)):
                continue
            table[key] = _plain(value)
        for key in ("jump", "profile", "facts"):
            if key in table and getattr(target, key) in (None, {}):
                del table[key]

    return _edit(change, given)


def remove_target(name: str, given: Path | None = None) -> Path:
    """Remove a target from the file; return the file's path."""
    def change(tables: Any) -> None:
        if name not in tables:
            raise UserError(f"{targets_file(given)} has no target {name!r}", f"it has {', '.join(tables) or 'none'}")
        del tables[name]

    return _edit(change, given)


def _plain(value: Any) -> Any:
    """Facts without None: TOML has no null."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if v is not None}
    return [_plain(v) for v in value] if isinstance(value, list) else value


def _edit(change: Callable[[Any], None], given: Path | None) -> Path:
    import tomlkit

    from llmc.files import staged_file
    from llmc.locks import locked

    path = targets_file(given)
    with locked(path, wait=True):
        if path.is_file():
            load_targets(path)  # do not overwrite a file that is not valid
        document = tomlkit.parse(path.read_text(encoding="utf-8") if path.is_file() else "")
        change(document.setdefault("targets", tomlkit.table(is_super_table=True)))
        with staged_file(path) as tmp:
            tmp.write_text(tomlkit.dumps(document), encoding="utf-8")
    return path
