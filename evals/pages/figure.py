"""A picture of a page with its heading and legend."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from llmc.evals.pages.svg import colour

Key = tuple[str, str, str]
"""An entry of a legend: a CSS class (dot or box), a CSS colour and a name."""


class Figure(NamedTuple):
    """svg: a chart; empty where nothing was measured. how: the command that fills an empty one."""

    title: str
    caption: str
    key: Sequence[Key] = ()
    svg: str = ""
    how: str = ""


def dots(names: Iterable[tuple[int, str]]) -> list[Key]:
    """The legend of marks and lines: each name by the number of its colour."""
    return [("dot", colour(i), name) for i, name in names]


def boxes(names: Iterable[str]) -> list[Key]:
    """The legend of the parts of bars."""
    return [("box", f"var(--k{i})", name) for i, name in enumerate(names)]
