"""Model families: one row for each (`table.py`), the fields of a row (`row.py`), and facts from tensor names (`names.py`).

Commands find their row here, by model_type, architecture or GGUF name. The algorithms stay in the commands. This imports no
large package.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

from llmc.families.row import Family
from llmc.families.table import ROWS

FAMILIES: dict[str, Family] = {f.model_type: f for f in ROWS}


def by_model_type(name: str) -> Family | None:
    """The row for `model_type` of a config.json."""
    return FAMILIES.get(name)


def by_architecture(name: str) -> Family | None:
    """The row for a class name in `architectures` of a config.json."""
    return next((f for f in FAMILIES.values() if f.architecture == name), None)


def by_gguf(name: str) -> Family | None:
    """The first row with this `general.architecture` of a GGUF file ('llama' gives Llama, although Mistral has it too)."""
    return next((f for f in FAMILIES.values() if f.gguf.name == name), None)


def nearest(name: str, known: Iterable[str]) -> str:
    """The most similar known names, as the end of an error message: '; nearest to it: A, B'; '' if none is similar.

    The common endings of class names do not count."""
    stems = {_stem(k): k for k in known}
    found = get_close_matches(_stem(name), stems, n=3)
    return f"; nearest to it: {', '.join(stems[s] for s in found)}" if found else ""


def _stem(name: str) -> str:
    return re.sub(r"ForCausalLM$|LMHeadModel$|_", "", name).lower()
