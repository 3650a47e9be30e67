"""Model families: a row for each (`table.py`), what a row says (`row.py`), and what names alone tell (`names.py`).

Commands find their row here, by whichever key they have, and keep the algorithms to themselves. Nothing heavy is imported.
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
    """The row for `general.architecture` of a GGUF file: the first of those that are written so (Llama, for Mistral too)."""
    return next((f for f in FAMILIES.values() if f.gguf.name == name), None)


def nearest(name: str, known: Iterable[str]) -> str:
    """'; nearest to it: …', the most alike of the known names, for an error that names an unknown one; empty where none is
    alike. What all class names end in does not count."""
    stems = {_stem(k): k for k in known}
    found = get_close_matches(_stem(name), stems, n=3)
    return f"; nearest to it: {', '.join(stems[s] for s in found)}" if found else ""


def _stem(name: str) -> str:
    return re.sub(r"ForCausalLM$|LMHeadModel$|_", "", name).lower()
