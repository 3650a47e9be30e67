"""Reads a Hugging Face model folder: safetensors only, one tensor at a time. Everything is checked before it is used."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.errors import UserError
from llmc.formats import contents, layouts
from llmc.formats.config_json import read_checked
from llmc.formats.weight_files import INDEX, SINGLE, weight_files

if TYPE_CHECKING:
    import torch

__all__ = ["CARD_FILES", "INDEX", "SINGLE", "TOKENIZER_FILES", "Checkpoint", "model_files", "read_config", "read_header"]

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json",
    "chat_template.jinja", "chat_template.json",
)
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


@dataclass
class Checkpoint:
    """A model folder: `config.json` and its tensors by name. Opening reads headers only."""

    folder: Path
    config: dict[str, Any]
    shard_of: dict[str, Path] = field(repr=False)
    headers: dict[Path, dict[str, Any]] = field(repr=False)
    quantization: dict[str, Any] | None = None
    """How its codes are stored (contents.quantization_of). None for a float model."""

    @classmethod
    def open(cls, folder: Path | str, look: bool = False) -> Checkpoint:
        """Read config.json and the headers of the weights.

        look: accept codes that no config explains, to list them only. Raises UserError if the files contradict each other.
        """
        folder = Path(folder)
        config = read_config(folder)
        shards, weight_map = weight_files(folder)
        headers = {s: read_header(s) for s in shards}
        ckpt = cls(folder, config, _places(folder, headers, weight_map), headers)
        ckpt.quantization = contents.quantization_of(ckpt)
        if ckpt.quantization is None:
            ckpt.config = {k: v for k, v in config.items() if k != "quantization_config"}
        if not look:
            contents.check(ckpt)
        return ckpt

    @property
    def files(self) -> list[Path]:
        return list(self.headers)

    def names(self) -> list[str]:
        return list(self.shard_of)

    def __contains__(self, name: str) -> bool:
        return name in self.shard_of

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.headers[self.shard_of[name]][name]["shape"])

    def dtype(self, name: str) -> str:
        """The stored type by its safetensors name: 'F32', 'F16', 'BF16', 'I32', …"""
        return str(self.headers[self.shard_of[name]][name]["dtype"])

    def nbytes(self, name: str) -> int:
        start, end = self.headers[self.shard_of[name]][name]["data_offsets"]
        return int(end - start)

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor as stored. Raises UserError if a float tensor holds NaN or infinity."""
        from safetensors import safe_open

        with safe_open(self.shard_of[name], framework="pt") as f:
            t: torch.Tensor = f.get_tensor(name)
        return self._checked(name, t)

    def part(self, name: str, index: int) -> torch.Tensor:
        """One slice along the first axis of a tensor. Errors as from `tensor`."""
        from safetensors import safe_open

        with safe_open(self.shard_of[name], framework="pt") as f:
            t: torch.Tensor = f.get_slice(name)[index]
        return self._checked(name, t)

    def empty(self, name: str) -> torch.Tensor:
        """A tensor without elements, in the stored type."""
        from safetensors import safe_open

        with safe_open(self.shard_of[name], framework="pt") as f:
            t: torch.Tensor = f.get_slice(name)[0:0]
        return t

    def _checked(self, name: str, t: torch.Tensor) -> torch.Tensor:
        import torch

        if t.is_floating_point() and not bool(torch.isfinite(t.sum(dtype=torch.float32))) and not bool(
            torch.isfinite(t).all()
        ):
            raise UserError(f"{name} in {self.shard_of[name]} holds NaN or infinity",
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
    from safetensors import safe_open

    with safe_open(one, framework="pt") as a, safe_open(other, framework="pt") as b:
        x, y = a.get_tensor(name), b.get_tensor(name)
        return bool((x == y).all())
