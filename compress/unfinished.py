"""The folder of an unfinished run, with a fingerprint of all settings and inputs that affect its result. `--resume` continues
in this folder, or reports the difference.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from llmc.closure import digest
from llmc.compress.text import Calibration
from llmc.errors import UserError
from llmc.files import write_sealed, writing
from llmc.precision import matmul_precision
from llmc.sealed import read_sealed
from llmc.temporary import remove

FILE = "fingerprint.json"
START_AGAIN = "run without --resume to start again"


def fingerprint(module: str, numbers: dict[str, Any], threads: int, files: dict[str, str],
                text: Calibration | None = None, **more: Any) -> dict[str, Any]:
    """All settings and inputs that affect the result, as JSON values.

    module: the module that makes the result; its source and its imports are hashed.  numbers: the options of the pass.
    files: sha256 of the model's files.  text: the calibration text.  more: other inputs of the pass."""
    deciding = {**numbers, "threads": threads, "source": files, "calibration_text": text.origin["sha256"] if text else None,
                "calibration_part_of": text.origin.get("of_samples") if text else None, **more, "matmul": matmul_precision(),
                "torch": torch.__version__, "code": digest(module)}
    found: dict[str, Any] = json.loads(json.dumps(deciding))
    return found


def open_unfinished(folder: Path, wanted: dict[str, Any], resume: bool) -> None:
    """Prepare `folder`. With `resume` its content stays if the fingerprint is the same, and a difference is a UserError.
    Otherwise the folder is emptied."""
    found = folder / FILE
    if resume and found.is_file():
        old = read_sealed(found, START_AGAIN)
        if differing := sorted(k for k in {*wanted, *old} if wanted.get(k) != old.get(k)):
            raise UserError(f"cannot resume: the unfinished run in {folder} differs in {', '.join(differing)}",
                            f"run with the same model and options, or {START_AGAIN.removeprefix('run ')}")
        return
    if folder.is_symlink():
        raise UserError(f"{folder}, where unfinished work is kept, is a link to another place", "remove the link")
    remove(folder)
    with writing(folder):
        folder.mkdir(parents=True)
        write_sealed(found, wanted)
