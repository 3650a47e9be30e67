"""The pages say what the program says."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
import yaml

from llmc.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("examples/*.md"))]


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PINNED = re.search(r"^typer==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


@pytest.mark.skipif(not PINNED or version("typer") != PINNED[1], reason="help is laid out by typer, and each does it its way")
def test_cli_page_is_current() -> None:
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == generator().page(), "run `make docs`"


def test_the_lists_of_families_are_current() -> None:
    for path, text in generator().pages().items():
        if path.name != "cli.md":
            assert path.read_text(encoding="utf-8") == text, f"{path}: run `make docs`"


def commands(group: Any = None, prefix: str = "") -> dict[str, set[str]]:
    """The options of every command, those of a group by both words: 'target setup'."""
    found: dict[str, set[str]] = {}
    for name, command in (group or typer.main.get_command(app)).commands.items():
        options = {o for p in command.params for o in (*p.opts, *p.secondary_opts) if o.startswith("-")}
        found[prefix + name] = options | {"--help", "-h"}
        if hasattr(command, "commands"):
            found |= commands(command, f"{name} ")
    return found


def test_commands_in_the_pages_exist_with_their_options() -> None:
    """Every `llmc …` line of a shell block, and of the demo, names a command and options that there are."""
    known = commands()
    block = re.compile(r"```bash\n(.*?)```", re.DOTALL)
    shell = [(page, text) for page in PAGES for text in block.findall(page.read_text(encoding="utf-8"))]
    demo = ROOT / "examples" / "demo.sh"
    seen = 0
    for page, text in [*shell, (demo, demo.read_text(encoding="utf-8"))]:
        for line in re.findall(r"^(?:step )?llmc (.*)$", text, re.MULTILINE):
            words = re.sub(r"#.*", "", line).split()
            first, second = [*(w for w in words if not w.startswith("-")), ""][:2]
            name = f"{first} {second}" if f"{first} {second}" in known else first
            assert name in known, f"{page.name}: llmc {line}"
            options = {w.split("=")[0] for w in words if re.match(r"--?[a-z]", w)} - {"--quiet", "--verbose"}
            assert options <= known[name], f"{page.name}: llmc {line}: {options - known[name]}"
            seen += 1
    assert seen > 15


def test_links_inside_the_repository_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


NEW = {"runtimes/targets/docker.py"}  # of an example in CONTRIBUTING.md


def test_files_and_functions_in_the_pages_are_there() -> None:
    """Every path of code, and in tables of architecture.md every function that stands in the cell before its file."""
    path = re.compile(r"\b(?:llmc|compress|export|runtimes|evals|docs|tests)/[\w/]+\.py\b")
    for page in (ROOT / "CONTRIBUTING.md", ROOT / "docs" / "architecture.md"):
        named = set(path.findall(page.read_text(encoding="utf-8"))) - NEW
        assert not [p for p in sorted(named) if not (ROOT / p).is_file()], page.name
    seen = 0
    for line in (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").splitlines():
        cells = line.split("|")[1:-1]
        files = "".join((ROOT / p).read_text(encoding="utf-8") for p in path.findall(line))
        for name in re.findall(r"`(\w[\w.]*)`", cells[1]) if files and len(cells) == 4 else []:
            assert re.search(rf"(def|class) {name.rpartition('.')[2]}\b", files), f"{name}: {line}"
            seen += 1
    assert seen > 30


def test_workflows_parse_and_pre_commit_has_the_pinned_ruff() -> None:
    for workflow in ROOT.glob(".github/workflows/*.yml"):
        read = yaml.safe_load(workflow.read_text(encoding="utf-8"))
        assert read["permissions"] == {"contents": "read"}
        assert all("run" in step or "@v" in step["uses"] for job in read["jobs"].values() for step in job["steps"])
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    pinned = re.search(r"^ruff==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    assert [repo["rev"] for repo in hooks["repos"] if "ruff" in repo["repo"]] == [f"v{pinned[1]}"]


def test_make_help_names_real_targets() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"`make ([a-z]+)", "\n".join(p.read_text(encoding="utf-8") for p in PAGES)))
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    assert named <= targets
    if shutil.which("make") is None:
        pytest.skip("no make here")
    listed = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {"demo", "test"} <= set(re.findall(r"make ([a-z]+)", listed))
