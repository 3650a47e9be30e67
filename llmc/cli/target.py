"""`llmc target add|ls|show|rm|probe`; `setup` and `clean` are in target_setup.py."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from llmc.cli import target_setup
from llmc.cli.group import Commands
from llmc.cli.target_setup import FILE, JSON, NAME

group = typer.Typer(cls=Commands, no_args_is_help=True, rich_markup_mode=None,
                    help="Manage the devices that artifacts are measured on.")


def register(app: typer.Typer) -> None:
    target_setup.register(group)
    app.add_typer(group, name="target")


@group.command("add")
def add(
    name: str = NAME,
    address: str = typer.Argument(..., help="ssh://user@host:22 or ssh://ALIAS, adb:SERIAL, emulated-arm64."),
    python: str | None = typer.Option(None, show_default=False, help="The device's Python. Default: python3."),
    cache: str | None = typer.Option(None, show_default=False, help="Folder there for copies. Default: ~/.cache/llmc."),
    cache_gb: float | None = typer.Option(None, show_default=False, help="Largest size of this folder, in GB. Default: 20."),
    jump: str | None = typer.Option(None, show_default=False, metavar="USER@HOST", help="Go through this host (ssh -J)."),
    profile: str | None = typer.Option(None, show_default=False, help="A device profile, for estimates."),
    targets: Path | None = FILE,
) -> None:
    """Write a device into targets.toml, or change its entry. llmc does not connect to it yet."""
    from dataclasses import replace

    from llmc.console import say
    from llmc.errors import UserError
    from llmc.runtimes.targets.target import LOCAL, Target, load_targets, targets_file, write_target

    if name in LOCAL:
        raise UserError(f"{name} is this machine and always available", "choose another name")
    options = {"python": python, "cache": cache, "cache_gb": cache_gb, "jump": jump, "profile": profile}
    given = {k: v for k, v in options.items() if v is not None}
    known = load_targets(targets).get(name) if targets_file(targets).is_file() else None
    # facts of the old address do not hold for a new one
    facts = {} if known is None or known.address != address else known.facts
    target = replace(known, address=address, facts=facts, **given) if known else Target(name, address, **given)  # type: ignore[arg-type]
    say(f"{write_target(target, targets)}: `llmc target probe {name}` measures it")


@group.command("ls")
def ls(targets: Path | None = FILE, as_json: bool = JSON) -> None:
    """List the devices."""
    from llmc.evals.report.show import table
    from llmc.runtimes.targets.show import row
    from llmc.runtimes.targets.target import load_targets

    found = load_targets(targets)
    if as_json:
        print(json.dumps({"targets": {name: t.as_dict() for name, t in found.items()}}, indent=2, ensure_ascii=False))
    else:
        print(table([["target", "address", "CPU", "cores", "memory", "reads", "probed"], *map(row, found.values())]))


@group.command("show")
def show(name: str = NAME, targets: Path | None = FILE, as_json: bool = JSON) -> None:
    """Print what is known about a device."""
    from llmc.runtimes.targets.show import lines
    from llmc.runtimes.targets.target import find_target

    target = find_target(name, targets)
    print(json.dumps(target.as_dict(), indent=2, ensure_ascii=False) if as_json else lines(target))


@group.command("rm")
def rm(name: str = NAME, targets: Path | None = FILE) -> None:
    """Remove a device from targets.toml. Its reports and its cache stay."""
    from llmc.console import say
    from llmc.runtimes.targets.target import remove_target

    say(f"{remove_target(name, targets)}: {name} was removed")


@group.command("probe")
def probe(name: str = NAME, targets: Path | None = FILE, as_json: bool = JSON) -> None:
    """Measure a device (CPU, memory bandwidth, matrix products, GPUs) and write the result into targets.toml."""
    from contextlib import closing
    from dataclasses import replace

    from llmc.console import say
    from llmc.runtimes.targets.device import connect, probed
    from llmc.runtimes.targets.show import lines
    from llmc.runtimes.targets.target import find_target, write_target

    target = find_target(name, targets)
    with closing(connect(target)) as device:
        found = replace(target, facts=probed(device))
    say(f"written to {write_target(found, targets)}")
    print(json.dumps(found.as_dict(), indent=2, ensure_ascii=False) if as_json else lines(found))
