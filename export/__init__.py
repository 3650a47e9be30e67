"""Exporters: one sub-package for each format. The package itself is callable: `llmc.export("small-4bit", format="gguf")`.

A function `llmc.export` and a package `llmc.export` would share one name, and the one imported last would hide the other.
So they are one object: a module whose class has `__call__`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from llmc.errors import UserError


class Export(ModuleType):
    """The type of this module."""

    def __call__(self, model: str | Path | None = None, format: str = "gguf", **options: Any) -> dict[str, Any]:
        """Export `model` (None: the newest artifact made in this folder) to a format; return the report.

        The options are the fields of the format's config (see llmc/export/formats.py). Raises UserError for an option of
        another format.
        """
        from dataclasses import fields

        from llmc.export.formats import FORMATS
        from llmc.options import make

        if format not in FORMATS:
            raise UserError(f"format {format!r} is not known", f"choose one of {', '.join(FORMATS)}")
        takes = {name: {f.name for f in fields(row.config)} for name, row in FORMATS.items()}
        others = {o: name for name in FORMATS if name != format for o in sorted(takes[name] - takes[format])}
        if wrong := [o for o in options if o in others]:
            names = ", ".join(f"--{o.replace('_', '-')}" for o in wrong)
            raise UserError(f"{names} belongs to --format {others[wrong[0]]}, not to {format}", "leave it out")
        row = FORMATS[format]
        return row.write(make(row.config, {"model": model, **options}))


sys.modules[__name__].__class__ = Export
