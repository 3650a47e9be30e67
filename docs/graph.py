"""The rooms of llmc and who imports whom. `python docs/graph.py` writes the drawing into docs/architecture.md;
`--check` fails
where the drawing is old, a module is in no room, modules import each other in a circle, or an arrow points upwards.

Imports inside functions count like all others.
"""

from __future__ import annotations

import sys
from pathlib import Path

from llmc.closure import imports, modules, source

PAGE = Path(__file__).parent / "architecture.md"
BEGIN, END = "<!-- graph: made by docs/graph.py -->", "<!-- end of graph -->"

# From top to bottom: a room may import itself and what is below it. The longest name that a module begins with is its room.
ROOMS = {
    "llmc": "the Python API: one function for each command",
    "llmc.cli": "the command line",
    "llmc.recipes": "chains of commands, run and resumed",
    "llmc.api": "one function for each command that is no chain",
    "llmc.about": "inspect, verify, doctor",
    "llmc.compress": "passes that change weights, and the loop that they share",
    "llmc.evals": "quality, bench, fit, compare, report, pages",
    "llmc.export": "writes files for a runtime",
    "llmc.sources": "a folder, a .gguf file or a hub id becomes a model folder",
    "llmc.runtimes": "runs an artifact, here or on a device",
    "llmc.rounding": "a matrix rounded to a type",
    "llmc.formats": "what lies on a disk",
    "core": "errors, console, files, locks, places, machine, cgroup, precision, options, closure, families",
}
CORE = ("cgroup", "closure", "console", "errors", "families", "files", "locks", "machine", "options", "overlap", "places",
        "precision", "privacy", "small_files", "streams", "temporary")


def room_of(module: str) -> str | None:
    if module in {f"llmc.{name}" for name in CORE} or module.startswith("llmc.families."):
        return "core"
    if module in ("llmc", "llmc.__main__"):
        return "llmc.cli" if module == "llmc.__main__" else "llmc"
    return next((room for room in ROOMS if room != "llmc" and (module + ".").startswith(f"{room}.")), None)


def graph() -> dict[str, tuple[str, ...]]:
    """The modules that each module imports. A package that says nothing but its docstring is left out."""
    return {m: imports(m) for m in modules() if source(m).name != "__init__.py" or imports(m)}


def circles(edges: dict[str, tuple[str, ...]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or not (Tarjan, "Depth-first search and linear graph algorithms",
    1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in edges.get(node, ()):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = stack[stack.index(node):]
            del stack[stack.index(node):]
            if len(group) > 1:
                found.append(sorted(group))

    for node in edges:
        if node not in index:
            visit(node)
    return found


def problems(edges: dict[str, tuple[str, ...]]) -> list[str]:
    """What is wrong with the rooms, one line each."""
    order = list(ROOMS)
    found = [f"{m} is in no room" for m in edges if room_of(m) is None]
    found += [f"circle: {' - '.join(group)}" for group in circles(edges)]
    for module, others in edges.items():
        for other in others:
            here, there = room_of(module), room_of(other)
            if here and there and order.index(there) < order.index(here):
                found.append(f"upwards: {module} -> {other}")
    return found


def drawing(edges: dict[str, tuple[str, ...]]) -> str:
    """The rooms as a table: the purpose of each, and the rooms that it imports."""
    lines = ["| room | what it is for | imports |", "|---|---|---|"]
    for room, purpose in ROOMS.items():
        own = [m for m in edges if room_of(m) == room]
        there = {room_of(o) for m in own for o in edges[m]} - {room}
        if own:
            lines.append(f"| {room} | {purpose} | {', '.join(r for r in ROOMS if r in there)} |")
    return "\n".join(lines)


def sizes(edges: dict[str, tuple[str, ...]]) -> str:
    """A line for each room: how many modules and lines it has."""
    own = {room: [m for m in edges if room_of(m) == room] for room in ROOMS}
    lines = {room: sum(source(m).read_text(encoding="utf-8").count("\n") for m in found) for room, found in own.items()}
    return "\n".join(f"{room:<14} {len(found):>4} modules {lines[room]:>7,} lines" for room, found in own.items())


def main() -> None:
    edges = graph()
    wrong = problems(edges)
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    new = f"{before}{BEGIN}\n\n{drawing(edges)}\n\n{END}{after}"
    if "--check" in sys.argv[1:]:
        wrong += [] if new == page else ["docs/architecture.md: the drawing is old, run `make graph`"]
    else:
        PAGE.write_text(new, encoding="utf-8")
        print(sizes(edges))
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
