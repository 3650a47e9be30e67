"""Make a page from a template and plain data."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from llmc.evals.report.show import plain

if TYPE_CHECKING:
    from jinja2 import Environment


def render(template: str, **data: object) -> str:
    """The HTML page. template: name of a file in templates/. All text except markupsafe.Markup is escaped."""
    return _environment().get_template(template).render(data)


@cache
def _environment() -> Environment:
    # imported here so that only commands that write a page load jinja2
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(loader=PackageLoader("llmc.evals.pages"), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["plain"] = plain
    return environment
