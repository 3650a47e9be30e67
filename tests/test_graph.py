"""docs/graph.py: the rooms, the arrows between them, and what it finds wrong."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def graph() -> ModuleType:
    spec = importlib.util.spec_from_file_location("graph", Path(__file__).parents[1] / "docs" / "graph.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_circle_is_found_however_long_and_wherever_one_begins(graph: ModuleType) -> None:
    edges = {"a": ("b",), "b": ("c", "e"), "c": ("d",), "d": ("b",), "e": (), "f": ("f2",), "f2": ("f",)}
    assert sorted(graph.circles(edges)) == [["b", "c", "d"], ["f", "f2"]]
    assert sorted(graph.circles(dict(reversed(edges.items())))) == [["b", "c", "d"], ["f", "f2"]]


def test_a_graph_without_circles_has_none(graph: ModuleType) -> None:
    assert graph.circles({"a": ("b", "c"), "b": ("d",), "c": ("d",), "d": ()}) == []


def test_arrows_may_go_down_and_stay_in_a_room(graph: ModuleType) -> None:
    assert graph.problems({
        "llmc.cli.quantize": ("llmc.compress.quantize.run",),
        "llmc.compress.quantize.run": ("llmc.compress.calibration", "llmc.formats.shards"),
        "llmc.formats.shards": ("llmc.errors",),
    }) == []


def test_an_arrow_upwards_is_named(graph: ModuleType) -> None:
    assert graph.problems({"llmc.formats.shards": ("llmc.compress.states",)}) == [
        "upwards: llmc.formats.shards -> llmc.compress.states"]
    assert graph.problems({"llmc.errors": ("llmc.formats.shards",)}) == ["upwards: llmc.errors -> llmc.formats.shards"]


def test_a_module_without_a_room_is_named(graph: ModuleType) -> None:
    assert graph.problems({"llmc.attic": ()}) == ["llmc.attic is in no room"]


def test_a_circle_between_modules_of_one_room_is_named(graph: ModuleType) -> None:
    edges = {"llmc.formats.weigh": ("llmc.formats.gguf",), "llmc.formats.gguf": ("llmc.formats.weigh",)}
    assert graph.problems(edges) == ["circle: llmc.formats.gguf - llmc.formats.weigh"]


def test_the_longest_name_decides_the_room(graph: ModuleType) -> None:
    rooms = {"llmc": "llmc", "llmc.__main__": "llmc.cli", "llmc.machine": "core", "llmc.families.llama": "core",
             "llmc.evals.bench.run": "llmc.evals", "llmc.evals_of_old": None}
    assert {m: graph.room_of(m) for m in rooms} == rooms


def test_every_room_is_drawn_in_order(graph: ModuleType) -> None:
    lines = graph.drawing(graph.graph()).splitlines()[2:]
    drawn = [line.split("|")[1].strip() for line in lines]
    assert drawn == [room for room in graph.ROOMS if room in drawn]
    assert {"llmc", "llmc.compress", "llmc.formats", "core"} <= set(drawn)


def test_the_code_has_no_circle_and_no_arrow_upwards(graph: ModuleType) -> None:
    found = graph.problems(graph.graph())
    assert not found, "\n".join(found)
