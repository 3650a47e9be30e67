"""From a template and plain data to the text of a page."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from llmc.evals.report.show import plain

if TYPE_CHECKING:
    from jinja2 import Environment


def render(template: str, **data: object) -> str:
    """The whole HTML. template: a file of templates/. Text is escaped; only markupsafe.Markup is taken as it is."""
    return _environment().get_template(template).render(data)


@cache
def _environment() -> Environment:
    # imported here: a command that writes no page does not wait for jinja2
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(loader=PackageLoader("llmc.evals.pages"), autoescape=True, undefined=StrictUndefined,
                       trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    made.filters["plain"] = plain
    return made
