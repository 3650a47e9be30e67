"""A pruned model as a plain Hugging Face folder: tensors, config, tokenizer, manifest; verified by reading back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from llmc.compress.quantize.assignment import linears_of
from llmc.compress.skeleton import Skeleton
from llmc.files import publish_folder, write_json
from llmc.formats.checkpoint import CARD_FILES, TOKENIZER_FILES, Checkpoint
from llmc.formats.manifest import MANIFEST, hash_folder, new_manifest, read_manifest
from llmc.formats.shards import Piece, pieces_of, write_checkpoint
from llmc.formats.source import origin_of


def write_folder(source: Path, folder: Path, pieces: list[Piece], config: dict[str, Any]) -> None:
    """Everything but the manifest into the new folder `folder`; what it holds is read back and held against the pieces."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write_checkpoint(folder, pieces)
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name in (*TOKENIZER_FILES, *CARD_FILES, "generation_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    _verify(folder, pieces)


def publish(source: Path, folder: Path, out: Path, described: dict[str, Any], entry: dict[str, Any]) -> dict[str, str]:
    """Add the manifest and give the folder its name. Returns sha256 of the weight files."""
    before = (read_manifest(source) or {}).get("passes", [])
    manifest = new_manifest("hf", origin_of(source, described), [*before, entry], outputs=hash_folder(folder))
    write_json(folder / MANIFEST, manifest)
    publish_folder(folder, out)
    return {name: digest for name, digest in manifest["outputs"].items() if "safetensors" in name}


def _verify(folder: Path, pieces: list[Piece]) -> None:
    """Every tensor must be bit for bit what it was made from; it may have another name there."""
    written = {p.name: p for file in Checkpoint.open(folder).files for p in pieces_of(file)}
    for piece in pieces:
        found = written[piece.name]
        if (found.dtype, found.shape) != (piece.dtype, piece.shape) or _bytes(found) != _bytes(piece):
            raise RuntimeError(f"{piece.name} was not written as it was computed")


def _bytes(piece: Piece) -> bytes:
    with piece.file.open("rb") as f:
        f.seek(piece.offset)
        return f.read(piece.nbytes)


def zeros_of(checkpoint: Checkpoint) -> tuple[list[int], list[int]]:
    """(exact zeros, weights) of the linears of each decoder layer, counted in the file."""
    skeleton = Skeleton(checkpoint, "cpu")
    zeros, weights = [0] * len(skeleton.layers), [0] * len(skeleton.layers)
    for layer, name, _ in linears_of(skeleton):
        stored = skeleton.stored_name(f"{name}.weight")
        assert stored is not None  # the folder was made with it
        tensor = checkpoint.tensor(stored)
        zeros[layer] += int((tensor == 0).sum())
        weights[layer] += tensor.numel()
    return zeros, weights
