"""`pytest --light`: the tests that need none of llmc's extras (llama.cpp, ONNX Runtime, Ray), found by their imports.

A test file is light where neither it nor a module of llmc that it imports, directly or not, imports a package of an extra.
Files that import the API (`import llmc`) are left out: its functions reach everything. So no list of files has to be
kept. A file that calls nothing of what it could reach says `pytestmark = pytest.mark.light`.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

from llmc.about.doctor import PACKAGES
from llmc.closure import closure, modules, source

EXTRAS = {m.split(".")[0] for extra, found in PACKAGES.items() if extra != "core" for m in found.values()} | {"ray"}


@cache
def is_light(file: Path) -> bool:
    """Whether a test file, or a module that tests share, can be imported and run without the extras."""
    text = file.read_text(encoding="utf-8")
    return "\npytestmark = pytest.mark.light\n" in text or _light(ast.parse(text), file.parent)


@cache
def heavy_fixtures(conftest: Path) -> frozenset[str]:
    """The fixtures of a conftest.py that call the API or import what is not light."""
    functions = [n for n in ast.parse(conftest.read_text(encoding="utf-8")).body if isinstance(n, ast.FunctionDef)]
    return frozenset(f.name for f in functions if not _light(f, conftest.parent) or any(
        isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "llmc" for n in ast.walk(f)))


def _light(code: ast.AST, folder: Path) -> bool:
    names, known = _imported(code), set(modules())
    if not all(is_light(helper) for n in names if (helper := folder / f"{n}.py").is_file()):  # tiny.py, sshd.py
        return False
    ours = {n for n in names if n.split(".")[0] == "llmc"}
    if any(n == "llmc" or (n.count(".") == 1 and n not in known) for n in ours):  # the API, or a function of it
        return False
    needed = names.union(*(_imported(ast.parse(source(m).read_text(encoding="utf-8"))) for m in closure(ours & known)))
    return EXTRAS.isdisjoint(n.split(".")[0] for n in needed)


def _imported(code: ast.AST) -> set[str]:
    """All that the code imports, anywhere in it: of `from a import b` both 'a.b' and 'a'."""
    names: set[str] = set()
    for node in ast.walk(code):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{a.name}" for a in node.names}
            names |= inside if node.module == "llmc" else {node.module, *inside}
    return names


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--light", action="store_true", help="only the tests that need none of llmc's extras")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    wanted = collection_path.name.startswith("test_") and collection_path.suffix == ".py" and config.getoption("--light")
    return True if wanted and not is_light(collection_path) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--light"):
        heavy = heavy_fixtures(Path(__file__).with_name("conftest.py"))
        left_out = [i for i in items if not heavy.isdisjoint(getattr(i, "fixturenames", ()))]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [i for i in items if i not in left_out]
