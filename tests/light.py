"""`pytest --light`: the tests that need none of llmc's extras (llama.cpp, ONNX Runtime, Ray), found by their imports.

A test file is light where neither it nor a module of llmc that it imports, directly or not, imports a package of an extra.
Files that import the API (`import llmc`) are left out: its functions reach everything. So no list of files has to be kept.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

from llmc.about.doctor import PACKAGES
from llmc.closure import closure, modules, source

EXTRAS = {m.split(".")[0] for extra, found in PACKAGES.items() if extra != "core" for m in found.values()} | {"ray"}
FIXTURES = {"made"}  # of conftest.py: it exports a .gguf file


@cache
def imported(file: Path) -> frozenset[str]:
    """All that a file imports, anywhere in it: of `from a import b` both 'a.b' and 'a'."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{a.name}" for a in node.names}
            names |= inside if node.module == "llmc" else {node.module, *inside}
    return frozenset(names)


@cache
def is_light(file: Path) -> bool:
    """Whether the file can be imported and run without the extras."""
    names, known = imported(file), set(modules())
    if not all(is_light(helper) for n in names if (helper := file.with_name(f"{n}.py")).is_file()):  # tiny, sshd
        return False
    ours = {n for n in names if n.split(".")[0] == "llmc"}
    if any(n == "llmc" or (n.count(".") == 1 and n not in known) for n in ours):  # the API, or a function of it
        return False
    needed = [names, *(imported(source(m)) for m in closure(ours & known))]
    return not any(n.split(".")[0] in EXTRAS for found in needed for n in found)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--light", action="store_true", help="only the tests that need none of llmc's extras")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    wanted = collection_path.name.startswith("test_") and collection_path.suffix == ".py" and config.getoption("--light")
    return True if wanted and not is_light(collection_path) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--light"):
        left_out = [i for i in items if FIXTURES & set(getattr(i, "fixturenames", ()))]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [i for i in items if i not in left_out]
