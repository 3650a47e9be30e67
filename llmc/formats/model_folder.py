"""The one writer of a model folder: weights, configs, tokenizer and card; read back, described, and published as a whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmc.files import publish_folder, write_json
from llmc.formats.checkpoint import CARD_FILES, Checkpoint
from llmc.formats.manifest import MANIFEST, hash_folder, new_manifest
from llmc.formats.shards import Piece, pieces_of, write_checkpoint
from llmc.formats.tokenizer_files import copy_tokenizer_files

CONFIGS = ("config.json", "quantize_config.json")

Check = Callable[[Checkpoint], None]  # raises where the written folder is not what was meant


def write(folder: Path, source: Path, pieces: list[Piece], config: dict[str, Any] | None, check: Check) -> Checkpoint:
    """Make the folder anew, with everything but the manifest. Returns what was read back of it.

    source: the model folder whose tokenizer, generation config and card go along; nothing else of it does.
    config: of config.json (a GPTQ `quantization_config` becomes quantize_config.json too); None to copy the source's files.
    check: what the pass knows of its tensors, beside their names, types and shapes, which are always held against `pieces`.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write_checkpoint(folder, pieces)
    if config is None:
        _copy(source, folder, *CONFIGS)
    else:
        quantization = config.get("quantization_config", {})
        values = (config, quantization) if quantization.get("quant_method") == "gptq" else (config,)
        for name, value in zip(CONFIGS, values, strict=False):
            (folder / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    copy_tokenizer_files(source, folder)
    _copy(source, folder, *CARD_FILES, "generation_config.json")
    return _read_back(folder, pieces, check)


def publish(folder: Path, out: Path, kind: str, source: dict[str, Any], passes: list[dict[str, Any]],
            **more: Any) -> dict[str, Any]:
    """Add the manifest, with the hash of every file, and give the folder its name `out`. Returns the manifest.

    kind, source, passes, more: as of `new_manifest`.
    """
    manifest = new_manifest(kind, source, passes, outputs=hash_folder(folder), **more)
    write_json(folder / MANIFEST, manifest)
    publish_folder(folder, out)
    return manifest


def weight_hashes(manifest: dict[str, Any]) -> dict[str, str]:
    """sha256 of the weight files, by name."""
    return {name: digest for name, digest in manifest["outputs"].items() if "safetensors" in name}


def same_bytes(pieces: list[Piece]) -> Check:
    """The check that each of these tensors is, bit for bit, what it was made from."""
    def check(written: Checkpoint) -> None:
        found = {p.name: p for file in written.files for p in pieces_of(file)}
        for piece in pieces:
            if any(a != b for a, b in zip(piece.blocks(), found[piece.name].blocks(), strict=True)):
                raise _differs(piece.name)
    return check


def _read_back(folder: Path, pieces: list[Piece], check: Check) -> Checkpoint:
    written = Checkpoint.open(folder)
    meant = {p.name: (p.dtype, tuple(p.shape)) for p in pieces}
    found = {name: (written.dtype(name), written.shape(name)) for name in written.names()}
    if wrong := sorted(name for name in {*meant, *found} if meant.get(name) != found.get(name)):
        raise _differs(wrong[0])
    check(written)
    return written


def _differs(name: str) -> RuntimeError:
    return RuntimeError(f"{name} was not written as it was computed")


def _copy(source: Path, folder: Path, *names: str) -> None:
    """Those of the files that are there."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
