"""The closure of a module: all modules of llmc that it needs, found from the imports in the source; a digest of their code.

A result depends on the code that computes it. So `--resume`, stored sensitivities and recipes keep such a digest beside a
result. If the code changes, they compute the result again. The zip for a device also holds a closure. Nothing is imported.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

ROOT = "llmc"
HERE = Path(__file__).parent
BESIDE = ("compress", "evals", "export", "runtimes")  # beside llmc/ in the repository, inside it once installed


def source(module: str) -> Path:
    """The file of a module of llmc; of a package, its `__init__.py`. Raises LookupError if there is none."""
    found = _file(module)
    if found is None:
        raise LookupError(f"there is no module {module}")
    return found


@cache
def _file(module: str) -> Path | None:
    parts = module.split(".")[1:]
    top = HERE.parent if parts and parts[0] in BESIDE and not (HERE / parts[0]).is_dir() else HERE
    path = top.joinpath(*parts)
    for file in (path / "__init__.py", path.with_name(path.name + ".py")):
        if module.split(".")[0] == ROOT and file.is_file():
            return file
    return None


def modules(package: str = ROOT) -> list[str]:
    """All modules and packages below `package`, and `package` itself, sorted."""
    found = [package]
    for path in source(package).parent.iterdir():
        if path.suffix == ".py" and path.stem != "__init__":
            found.append(f"{package}.{path.stem}")
        elif (path / "__init__.py").is_file():
            found += modules(f"{package}.{path.name}")
    if package == ROOT:
        found += [m for name in BESIDE for m in modules(f"{ROOT}.{name}")]
    return sorted(set(found))


@cache
def imports(module: str, nested: bool = True) -> tuple[str, ...]:
    """The modules of llmc that `module` imports, sorted. Imports for type checkers do not count.

    nested: also those inside functions; without it, only those that run when `module` is imported.
    """
    tree = ast.parse(source(module).read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in _statements(tree.body, nested):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{a.name}" for a in node.names}
            found = {n for n in inside if _file(n)}
            names |= found if found == inside else {node.module, *found}
    return tuple(sorted(n for n in names - {module} if _file(n)))


def _statements(body: list[ast.stmt], nested: bool) -> Iterator[ast.stmt]:
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        if nested:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.stmt):
                    yield from _statements([child], nested)
                elif isinstance(child, ast.ExceptHandler | ast.match_case):
                    yield from _statements(child.body, nested)


def closure(entries: Iterable[str], nested: bool = True) -> list[str]:
    """The modules `entries` and all modules of llmc that they import, directly or not, sorted."""
    found: set[str] = set()
    todo = list(entries)
    while todo:
        module = todo.pop()
        if module not in found:
            found.add(module)
            todo += imports(module, nested)
    return sorted(found)


@cache
def digest(*entries: str) -> str:
    """The sha256 of the source of `entries` and of all modules of llmc that they import, nested imports included."""
    h = hashlib.sha256()
    for module in closure(entries):
        h.update(module.encode() + b"\0" + source(module).read_bytes())
    return h.hexdigest()
