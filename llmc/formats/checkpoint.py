"""Reads a Hugging Face model folder: safetensors only, one tensor at a time. Everything is checked before it is used.

FP8 and MXFP4 tensors are read as the values that they mean (decoded.py): a folder of them is a float model."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from llmc.errors import UserError
from llmc.formats import contents, fp8, layouts, mxfp4
from llmc.formats.chat_template import template_in
from llmc.formats.config_json import read_checked, read_generation, read_tokenizer_config
from llmc.formats.decoded import Coded, Decoded
from llmc.formats.packed import layout_of
from llmc.formats.weight_files import INDEX, SINGLE, weight_files
from llmc.small_files import LARGE, check_file, read_json_object

if TYPE_CHECKING:
    import torch

__all__ = ["CARD_FILES", "INDEX", "SINGLE", "TOKENIZER_FILES", "Checkpoint", "model_files", "read_config", "read_header"]

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json",
    "chat_template.jinja", "chat_template.json",
)
# torch's name of a safetensors type
TORCH_TYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16",
    "U8": "uint8", "BOOL": "bool", "C64": "complex64",
}
DECODERS = {"fp8": fp8.decode, "mxfp4": mxfp4.decode}  # by Layout.floats
# Those among them, and others, that are JSON objects
OBJECTS = ("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json", "quantize_config.json")
CARD_FILES = ("README.md", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "NOTICE.txt", "USE_POLICY.md")


def read_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file. Raises UserError if the file is shorter than its header states."""
    try:
        actual = path.stat().st_size
        with path.open("rb") as f:
            raw = f.read(8)
            n = struct.unpack("<Q", raw)[0] if len(raw) == 8 else -1
            if not 0 < n <= min(100_000_000, actual - 8):
                raise UserError(f"{path} is not a complete safetensors file", "download it again")
            header: dict[str, Any] = json.loads(f.read(n))
        tensors = [v for k, v in header.items() if k != "__metadata__"]
        end = 8 + n + max((int(v["data_offsets"][1]) for v in tensors), default=0)
        if not all(isinstance(v["dtype"], str) and all(isinstance(n, int) for n in v["shape"]) for v in tensors):
            raise ValueError("a type or shape is none")
    except FileNotFoundError as e:
        raise UserError(f"the shard {path} is missing", "download the whole model folder again") from e
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as e:
        raise UserError(f"{path} has a damaged safetensors header", "download it again") from e
    if actual < end:
        raise UserError(f"{path} is {actual:,} bytes long and should be {end:,}: the download is incomplete",
                        "download it again")
    return header


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A file, opened by safetensors. What that refuses in a header (gaps, overlaps, wrong sizes) is a UserError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as f:
            yield f
    except SafetensorError as e:
        raise UserError(f"{path} has a damaged safetensors header: {e}", "download it again") from e


@dataclass
class Checkpoint:
    """A model folder: `config.json` and its tensors by name. Opening reads headers only."""

    folder: Path
    config: dict[str, Any]
    shard_of: dict[str, Path] = field(repr=False)
    headers: dict[Path, dict[str, Any]] = field(repr=False)
    quantization: dict[str, Any] | None = None
    """How its codes are stored (contents.quantization_of). None for a float model."""
    decoded: Decoded = field(default_factory=Decoded)
    """Its float tensors that are stored as codes."""

    @classmethod
    def open(cls, folder: Path | str, look: bool = False) -> Checkpoint:
        """Read config.json and the headers of the weights.

        look: accept codes that no config explains, to list them only. Raises UserError if the files contradict each other.
        """
        folder = Path(folder)
        config = read_config(folder)
        if not look:
            check_small_files(folder)
        shards, weight_map = weight_files(folder)
        headers = {s: read_header(s) for s in shards}
        ckpt = cls(folder, config, _places(folder, headers, weight_map), headers)
        ckpt.quantization = contents.quantization_of(ckpt)
        if form := layout_of(ckpt.quantization).floats:
            ckpt.decoded = DECODERS[form](ckpt, ckpt.quantization or {})
            if ckpt.decoded.tensors:
                contents.warn_of_decoded(folder, ckpt.decoded.note)
                ckpt.quantization = None
        if ckpt.quantization is None:
            ckpt.config = {k: v for k, v in config.items() if k != "quantization_config"}
        if not look:
            contents.check(ckpt)
        return ckpt

    @property
    def files(self) -> list[Path]:
        return list(self.headers)

    def names(self) -> list[str]:
        """The tensors that the model knows. A decoded one stands where the first of its parts is stored."""
        named = {coded.parts[0]: name for name, coded in self.decoded.tensors.items()}
        parts = self.decoded.parts()
        return [named.get(n, n) for n in self.shard_of if n in named or n not in parts]

    def __contains__(self, name: str) -> bool:
        return name in self.decoded.tensors or (name in self.shard_of and name not in self.decoded.parts())

    def shape(self, name: str) -> tuple[int, ...]:
        if coded := self.coded(name):
            return coded.shape
        return tuple(self.headers[self.shard_of[name]][name]["shape"])

    def dtype(self, name: str) -> str:
        """The stored type by its safetensors name: 'F32', 'F16', 'BF16', 'I32', 'F8_E4M3', …; 'MXFP4' for experts in it."""
        if coded := self.coded(name):
            return coded.type
        return str(self.headers[self.shard_of[name]][name]["dtype"])

    def nbytes(self, name: str) -> int:
        """The bytes that a tensor takes in the files, with its scales."""
        def stored(part: str) -> int:
            start, end = self.headers[self.shard_of[part]][part]["data_offsets"]
            return int(end - start)

        coded = self.coded(name)
        return sum(map(stored, coded.parts if coded else (name,)))

    def coded(self, name: str) -> Coded | None:
        """How a float tensor is stored as codes. None if it is stored as it is."""
        return self.decoded.tensors.get(name)

    def raw(self, name: str, index: int | slice | None = None) -> torch.Tensor:
        """One tensor as stored, codes as codes. index: a slice along the first axis; None: all of it.

        The bytes are read, not mapped: a file that is larger than the memory cannot be mapped on every system.
        """
        import torch

        file = self.shard_of[name]
        entry = self.headers[file][name]
        kind: torch.dtype | None = getattr(torch, TORCH_TYPES.get(entry["dtype"], ""), None)
        if kind is None:
            raise UserError(f"{name} of {file} has the type {entry['dtype']}, which llmc cannot read",
                            f"types: {', '.join(TORCH_TYPES)}")
        (start, end), shape = entry["data_offsets"], list(entry["shape"])
        if math.prod(shape) * kind.itemsize != end - start:
            raise UserError(f"{name} of {file} has {end - start} bytes, and {entry['dtype']} {shape} has "
                            f"{math.prod(shape) * kind.itemsize}", "the file is damaged: download it again")
        if index is not None:
            rows = range(shape[0])[index]
            first, count = (rows, 1) if isinstance(rows, int) else (rows.start, len(rows))
            row = (end - start) // max(1, shape[0])
            start, end = start + first * row, start + (first + count) * row
            shape = shape[1:] if isinstance(rows, int) else [count, *shape[1:]]
        found = torch.empty(end - start, dtype=torch.uint8)
        with file.open("rb") as f:
            f.seek(_data_start(f) + start)
            read = f.readinto(found.numpy().data)
        if read != end - start:
            raise UserError(f"{file} ends inside {name}", "download it again")
        return found.view(kind).view(shape)

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor as stored, or the values that its codes mean. Raises UserError if floats are NaN or infinite."""
        coded = self.coded(name)
        return self._checked(name, coded.values(None) if coded else self.raw(name))

    def part(self, name: str, index: int) -> torch.Tensor:
        """One slice along the first axis of a tensor. Errors as from `tensor`."""
        coded = self.coded(name)
        return self._checked(name, coded.values(index) if coded else self.raw(name, index))

    def empty(self, name: str) -> torch.Tensor:
        """A tensor without elements, in the stored type, or in that of the values of codes."""
        coded = self.coded(name)
        return coded.values(slice(0, 0)) if coded else self.raw(name, slice(0, 0))

    def _checked(self, name: str, t: torch.Tensor) -> torch.Tensor:
        import torch

        if t.is_floating_point() and not bool(torch.isfinite(t.sum(dtype=torch.float32))) and not bool(
            torch.isfinite(t).all()
        ):
            coded = self.coded(name)
            raise UserError(f"{name} in {self.shard_of[coded.parts[0] if coded else name]} holds NaN or infinity",
                            "the checkpoint is damaged or training diverged: use an earlier one")
        return t


def model_files(folder: Path) -> list[Path]:
    """The files that define a model and its tokenizer."""
    index = () if (folder / SINGLE).is_file() else (INDEX,)
    names = ("config.json", "generation_config.json", *index, *TOKENIZER_FILES)
    return [folder / n for n in names if (folder / n).is_file()] + Checkpoint.open(folder).files


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a model folder."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise UserError(f"{folder} is not a model folder", "give a Hugging Face folder, a .gguf file or a hub id")
    if not path.is_file():
        raise layouts.no_config(folder)
    layouts.refuse_adapter(folder)
    return read_checked(path)


def _data_start(file: BinaryIO) -> int:
    """The position of the first byte of data in a safetensors file."""
    return 8 + int(struct.unpack("<Q", file.read(8))[0])
def check_small_files(folder: Path) -> None:
    """Read the small files beside config.json that a new folder gets too. Raises UserError for a damaged one now, not at the
    end of the work."""
    read_generation(folder)
    read_tokenizer_config(folder)
    template_in(folder)
    for name in (*TOKENIZER_FILES, *CARD_FILES):
        if (folder / name).is_file():
            check_file(folder / name, LARGE, "download it again")
    for name in OBJECTS:
        if (path := folder / name).is_file():
            status = path.stat()
            _check_object(path, status.st_mtime_ns, status.st_size)


@cache
def _check_object(path: Path, modified: int, length: int) -> None:
    """A command opens a folder several times, and a tokenizer.json can have 30 MB."""
    read_json_object(path, LARGE, "download it again")


def _places(folder: Path, headers: dict[Path, dict[str, Any]], weight_map: dict[str, str]) -> dict[str, Path]:
    """{tensor: its file}. Raises UserError if the index names a tensor that no file has, or if two files have one tensor with
    other values."""
    found: dict[str, Path] = {}
    for file, header in headers.items():
        for name in header:
            if name == "__metadata__":
                continue
            if name in found and not _same(name, headers, found[name], file):
                raise UserError(f"{name} is in {found[name].name} and in {file.name} of {folder}, with other values",
                                "two saves are mixed: download or save the model again")
            if name not in found or weight_map.get(name) == file.name:
                found[name] = file
    if lost := sorted(weight_map.keys() - found.keys()):
        raise UserError(f"{folder}: {len(lost)} tensors of {INDEX} are in no shard, first {lost[0]}",
                        "download the model again")
    return {name: found[name] for header in headers.values() for name in header if name in found}


def _same(name: str, headers: dict[Path, dict[str, Any]], one: Path, other: Path) -> bool:
    """Whether two files hold a tensor with the same type, shape and bytes."""
    if any(headers[one][name][key] != headers[other][name][key] for key in ("dtype", "shape")):
        return False
    with _opened(one) as a, _opened(other) as b:
        x, y = a.get_tensor(name), b.get_tensor(name)
        return bool((x == y).all())
