"""A figure of a page: a chart with title, caption and legend."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from llmc.evals.pages.svg import colour

Key = tuple[str, str, str]
"""An entry of a legend: a CSS class (dot or box), a CSS colour and a name."""


class Figure(NamedTuple):
    """svg: the chart; empty if nothing was measured. how: the command that measures the data of an empty chart."""

    title: str
    caption: str
    key: Sequence[Key] = ()
    svg: str = ""
    how: str = ""


def dots(names: Iterable[tuple[int, str]]) -> list[Key]:
    """The legend of marks and lines. names: (number of the colour, name)."""
    return [("dot", colour(i), name) for i, name in names]


def boxes(names: Iterable[str]) -> list[Key]:
    """The legend of the parts of stacked bars."""
    return [("box", f"var(--k{i})", name) for i, name in enumerate(names)]
