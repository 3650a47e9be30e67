"""Tensors of an unfinished run in one safetensors file, with a checksum of all of them in its metadata.

A killed run leaves a whole file or none. A file that a disk or a copy damaged is told when it is read.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from llmc.compress.unfinished import START_AGAIN
from llmc.errors import UserError
from llmc.files import staged_file
from llmc.formats.checkpoint import read_header
from llmc.small_files import check_file

SEAL = "crc32"


def save_state(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write the tensors, and more texts, as one file."""
    kept = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    with staged_file(path) as tmp:
        save_file(kept, tmp, metadata={**(metadata or {}), SEAL: str(_checksum(kept, metadata or {}))})


def load_state(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(the tensors, the texts) of a file that `save_state` wrote. Raises UserError if it is damaged or missing."""
    check_file(path, 1 << 50, START_AGAIN)
    try:
        read_header(path)  # safetensors maps the whole file first, and what is none may be larger than the memory
    except UserError as e:
        raise UserError(f"{path} is damaged: it {e.problem.removeprefix(f'{path} ')}", START_AGAIN) from e
    try:
        with safe_open(path, framework="pt") as f:
            metadata: dict[str, str] = dict(f.metadata() or {})
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 - f is not a dictionary
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path} is damaged: {e}", START_AGAIN) from e
    if metadata.pop(SEAL, None) != str(_checksum(tensors, metadata)):
        raise UserError(f"{path} is damaged: its checksum is another one", START_AGAIN)
    return tensors, metadata


def _checksum(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> int:
    """CRC-32 of everything in the file."""
    found = zlib.crc32(repr(sorted(metadata.items())).encode())
    for name, t in sorted(tensors.items()):
        found = zlib.crc32(f"{name} {t.dtype} {tuple(t.shape)}".encode(), found)
        if t.numel():
            found = zlib.crc32(t.reshape(-1).view(torch.uint8).numpy().data, found)
    return found
