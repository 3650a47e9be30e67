"""Writes model folders: weights, configs, tokenizer and card. A folder is read back and checked before it is published."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmc.files import publish_folder, write_json
from llmc.formats.checkpoint import CARD_FILES, Checkpoint
from llmc.formats.manifest import MANIFEST, hash_folder, new_manifest
from llmc.formats.no_code import remove_code
from llmc.formats.shards import Piece, pieces_of, write_checkpoint
from llmc.formats.tokenizer_files import copy_tokenizer_files

CONFIGS = ("config.json", "quantize_config.json")

Check = Callable[[Checkpoint], None]  # raises an error if the written folder is wrong


def write(folder: Path, source: Path, pieces: list[Piece], config: dict[str, Any] | None, check: Check) -> Checkpoint:
    """Write the folder without its manifest, and return it as read back. An older folder is replaced.

    source: the model folder from which tokenizer, generation config and card are copied, and nothing else.
    config: the content of config.json. A GPTQ `quantization_config` also becomes quantize_config.json. None: copy both.
    check: checks of the pass. Names, types and shapes of the tensors are always compared with `pieces`.
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
    remove_code(folder, "the model")
    return _read_back(folder, pieces, check)


def publish(folder: Path, out: Path, kind: str, source: dict[str, Any], passes: list[dict[str, Any]],
            **more: Any) -> dict[str, Any]:
    """Write the manifest with the hash of every file, and rename the folder to `out`. Returns the manifest.

    kind, source, passes, more: see `new_manifest`.
    """
    manifest = new_manifest(kind, source, passes, outputs=hash_folder(folder), **more)
    write_json(folder / MANIFEST, manifest)
    publish_folder(folder, out)
    return manifest


def weight_hashes(manifest: dict[str, Any]) -> dict[str, str]:
    """{file name: sha256} of the weight files."""
    return {name: digest for name, digest in manifest["outputs"].items() if "safetensors" in name}


def same_bytes(pieces: list[Piece]) -> Check:
    """A check that each of these tensors has, bit for bit, the bytes of its piece."""
    def check(written: Checkpoint) -> None:
        found = {p.name: p for file in written.files for p in pieces_of(file)}
        for piece in pieces:
            if any(a != b for a, b in zip(piece.blocks(), found[piece.name].blocks(), strict=True)):
                raise _differs(piece.name)
    return check


def _read_back(folder: Path, pieces: list[Piece], check: Check) -> Checkpoint:
    written = Checkpoint.open(folder)
    expected = {p.name: (p.dtype, tuple(p.shape)) for p in pieces}
    found = {name: (written.dtype(name), written.shape(name)) for name in written.names()}
    if wrong := sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name)):
        raise _differs(wrong[0])
    check(written)
    return written


def _differs(name: str) -> RuntimeError:
    return RuntimeError(f"{name} was not written as it was computed")


def _copy(source: Path, folder: Path, *names: str) -> None:
    """Copy the named files that exist."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
