"""Reads a Hugging Face model folder: safetensors only, one tensor at a time. Everything is checked before it is used."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.errors import UserError
from llmc.formats.config_json import read_checked

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
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
        end = 8 + n + max((int(v["data_offsets"][1]) for k, v in header.items() if k != "__metadata__"), default=0)
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

    @classmethod
    def open(cls, folder: Path | str) -> Checkpoint:
        folder = Path(folder)
        config = read_config(folder)
        shards = _shards(folder)
        headers = {s: read_header(s) for s in shards}
        shard_of = {name: s for s, h in headers.items() for name in h if name != "__metadata__"}
        if (folder / INDEX).is_file():
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            if missing := sorted(set(index) - set(shard_of)):
                raise UserError(f"{folder}: {len(missing)} tensors of {INDEX} are in no shard, first {missing[0]}",
                                "download the model again")
        return cls(folder, config, shard_of, headers)

    @property
    def files(self) -> list[Path]:
        return list(self.headers)

    @property
    def quantization(self) -> dict[str, Any] | None:
        """`quantization_config` of config.json, or None for a float model."""
        return self.config.get("quantization_config")

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
        import torch
        from safetensors import safe_open

        with safe_open(self.shard_of[name], framework="pt") as f:
            t: torch.Tensor = f.get_tensor(name)
        if t.is_floating_point() and not bool(torch.isfinite(t.sum(dtype=torch.float32))) and not bool(
            torch.isfinite(t).all()
        ):
            raise UserError(f"{name} in {self.shard_of[name]} holds NaN or infinity",
                            "the checkpoint is damaged or training diverged: use an earlier one")
        return t


def model_files(folder: Path) -> list[Path]:
    """The files that define a model and its tokenizer."""
    names = ("config.json", "generation_config.json", INDEX, *TOKENIZER_FILES)
    return [folder / n for n in names if (folder / n).is_file()] + Checkpoint.open(folder).files


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a model folder."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise UserError(f"{folder} is not a model folder", "give a Hugging Face folder, a .gguf file or a hub id")
    if not path.is_file():
        raise UserError(f"{folder} has no config.json", "give a Hugging Face model folder")
    return read_checked(path)


def _shards(folder: Path) -> list[Path]:
    """The shard files, in order. Raises UserError if one is missing or outside the folder."""
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(f"{folder / INDEX} is damaged", "download the model again") from e
        for n in names:
            if not isinstance(n, str) or "/" in n or "\\" in n or n in ("", "..") or not n.endswith(".safetensors"):
                raise UserError(f"{folder / INDEX} points outside the folder: {n!r}",
                                "do not trust this model; shards must be .safetensors files beside the index")
            if not (folder / n).is_file():
                raise UserError(f"the shard {n} is missing from {folder}", "download the whole model folder again")
        return [folder / n for n in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
    if pickles:
        raise UserError(f"{folder} has only pickle weights ({pickles[0]}), which can run code when read",
                        "convert it to safetensors first (`save_pretrained` of transformers does)")
    raise UserError(f"{folder} has no {SINGLE} and no {INDEX}", "give a model folder with safetensors weights")
