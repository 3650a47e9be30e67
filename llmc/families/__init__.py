"""Model families: one row for each (`table.py`), the fields of a row (`row.py`), and facts from tensor names (`names.py`).

Commands find their row here, by model_type, architecture or GGUF name. The algorithms stay in the commands. This imports no
large package.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from llmc.errors import UserError
from llmc.families.row import Family
from llmc.families.table import ROWS

FAMILIES: dict[str, Family] = {f.model_type: f for f in ROWS}


def by_model_type(name: str) -> Family | None:
    """The row for `model_type` of a config.json."""
    return FAMILIES.get(name)


def by_architecture(name: str) -> Family | None:
    """The row for a class name in `architectures` of a config.json."""
    return next((f for f in FAMILIES.values() if f.architecture == name), None)


def of_config(config: dict[str, Any]) -> Family | None:
    """The row for a config.json: by its `architectures`, or by its model_type if it names none.

    Raises UserError if it names the base class of a family, which has no head."""
    names = config.get("architectures") or []
    family = by_model_type(str(config.get("model_type")))
    if not names:
        return family
    found = next((f for name in names if (f := by_architecture(name))), None)
    if found is None and family is not None and _stem(str(names[0]).removesuffix("Model")) == _stem(family.architecture):
        raise UserError(f"config.json gives the architecture {names[0]}, which is a base class without a head",
                        f'if the folder holds a whole language model, write "{family.architecture}" in `architectures`')
    return found


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
