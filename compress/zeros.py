"""The zeros of a pruned model that later passes must keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmc.compress.prune.config import MASKS
from llmc.formats.manifest import read_manifest


def mask_of(folder: Path) -> dict[str, Any] | None:
    """The manifest entry of the pass that pruned a model folder to a mask; None if there is none."""
    passes = (read_manifest(folder) or {}).get("passes", [])
    found = [p for p in passes if p.get("name") == "prune" and p.get("config", {}).get("method") in MASKS]
    return found[-1] if found else None
