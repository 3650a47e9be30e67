"""A group of commands."""

from __future__ import annotations

from typing import Any

import typer.core


class Commands(typer.core.TyperGroup):
    """The group of commands. Its flags that typer leaves at None are False here: to find out that None is no bool,
    typer imports pydantic, which would be half the time of every --help."""

    def get_params(self, ctx: Any) -> Any:
        params = super().get_params(ctx)
        for param in params:
            if param.name in ("help", "install_completion", "show_completion"):
                param.default = False
        return params
