"""`llmc target setup|clean`, and the options that all commands of `llmc target` share."""

from __future__ import annotations

import json
from pathlib import Path

import typer

NAME = typer.Argument(..., help="The target's name: a-z, 0-9, '.', '_' and '-'.")
FILE = typer.Option(None, "--targets", metavar="FILE", show_default=False,
                    help="File that names the targets. Default: ./targets.toml, or the one in ~/.config/llmc.")
JSON = typer.Option(False, "--json", help="Print one JSON object.")


def register(group: typer.Typer) -> None:
    group.command()(setup)
    group.command()(clean)


def setup(
    name: str = NAME,
    install: bool = typer.Option(False, "--install", help="Install what is missing. The device uses its own network."),
    runtime: str = typer.Option("gguf,onnx", metavar="RUNTIME,...", help="Kinds of artifacts to run: gguf, onnx."),
    llama_bench: Path | None = typer.Option(None, metavar="FILE", show_default=False, exists=True, dir_okay=False,
                                            help="A llama-bench built for Android, to be copied to the device."),
    targets: Path | None = FILE,
    as_json: bool = JSON,
) -> None:
    """Show what a device has installed to run artifacts, and install what is missing."""
    from llmc.runtimes.targets import setup as device
    from llmc.runtimes.targets.target import find_target

    found = device.setup(find_target(name, targets), install, tuple(runtime.split(",")), llama_bench)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    print(f"{name}: {found['executable']}, {found['python']}")
    for package, version in found["packages"].items():
        print(f"  {package:<18} {version or 'not installed'}")


def clean(name: str = NAME, targets: Path | None = FILE, as_json: bool = JSON) -> None:
    """Remove the copies in a device's cache, except those in use."""
    from llmc.console import say, size
    from llmc.runtimes.targets import setup as device
    from llmc.runtimes.targets.target import find_target

    removed, left = device.clean(find_target(name, targets))
    if as_json:
        print(json.dumps({"target": name, "removed": removed, "left": left}))
    say(f"{name}: removed {size(removed)}" + (f", {size(left)} are in use" if left else ""))
