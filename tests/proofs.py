"""What the tests of models proved, for `llmc models`: a file that `make test-models` writes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import tiny

from llmc.about.models import PROOFS
from llmc.families import FAMILIES

PACKAGES = ("torch", "transformers", "gguf", "llama-cpp-python", "onnxruntime-genai")
WRITE = "LLMC_PROVED"  # set: the file is written

_found: dict[str, dict[str, list[dict[str, float]] | None]] = {}
_converted: dict[str, list[dict[str, float]] | None] = {}


@contextmanager
def proving(name: str, what: str) -> Iterator[dict[str, float]]:
    """A proof of one column of the table, for an entry of `tiny.MODELS`. Takes its figures. If the body fails, the family has
    no proof of this column, whatever its other entries prove."""
    figures: dict[str, float] = {}
    family = _found.setdefault(tiny.family_of(name), {})
    before = family.get(what, [])
    family[what] = None
    yield figures
    family[what] = None if before is None else [*before, figures]


@contextmanager
def converting(model_type: str) -> Iterator[dict[str, float]]:
    """Like `proving`, for a GGUF file of an architecture that is not in the table of families."""
    figures: dict[str, float] = {}
    before = _converted.get(model_type, [])
    _converted[model_type] = None
    yield figures
    _converted[model_type] = None if before is None else [*before, figures]


def write(path: Path = PROOFS) -> None:
    """Replace the proofs of the families that ran. Of several entries of a family, the largest figures count."""
    if not os.environ.get(WRITE):
        return
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    known, others = before.get("families", {}), before.get("converted", {})
    for family, columns in _found.items():
        made = {what: _worst(runs) for what, runs in columns.items() if runs}
        known[family] = {**{what: v for what, v in known.get(family, {}).items() if what not in columns}, **made}
    kept = {family: dict(sorted(known[family].items())) for family in FAMILIES if known.get(family)}
    packages = {name: metadata.version(name).partition("+")[0] for name in PACKAGES}
    others = {name: v for name, v in others.items() if name not in _converted}
    others |= {name: _worst(runs) for name, runs in _converted.items() if runs}
    path.write_text(json.dumps({"packages": packages, "families": kept, "converted": dict(sorted(others.items()))}, indent=1)
                    + "\n", encoding="utf-8")


def _worst(runs: list[dict[str, float]]) -> dict[str, float]:
    names = sorted({name for run in runs for name in run})
    return {name: float(f"{max(run[name] for run in runs if name in run):.1e}") for name in names}
