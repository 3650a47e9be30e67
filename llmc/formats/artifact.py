"""An artifact: a file or a folder that a runtime opens. Each format is a class in llmc/formats/artifacts.

These modules run on devices too: at module level they import the standard library and light modules of llmc, nothing else.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NotRequired, TypedDict

from llmc.errors import UserError

if TYPE_CHECKING:
    from llmc.formats.kv import KvShape
    from llmc.formats.tensors import Tensor


class ClassSize(TypedDict):
    """The tensors of one class."""

    bytes: int
    parameters: int  # elements
    types: list[str]  # stored types, sorted


class Size(TypedDict):
    """What an artifact weighs."""

    file_bytes: int  # of the weight files on the disk
    tensor_bytes: int  # of the tensors alone
    parameters: int  # elements of all tensors
    bits_per_weight: float  # 8 * tensor_bytes / parameters
    decoder_bits_per_weight: float  # of attention and MLP matrices alone
    token_bytes: int  # that one decoded token reads: every tensor but the embedding rows of other tokens
    tied: bool  # the embedding is the output head
    types: dict[str, int]  # bytes by stored type
    matrices: NotRequired[dict[str, int]]  # how many by stored type; missing in reports of earlier versions
    classes: dict[str, ClassSize]  # by each of CLASSES


class Artifact(ABC):
    """One artifact, not opened yet. Every method reads what it needs: headers and descriptions, and weights only where it
    says so. All raise UserError where the artifact is damaged."""

    format: ClassVar[str]
    """'gguf', 'onnx' or 'hf', as manifests and reports have it."""
    label: ClassVar[str]
    """What a message calls one: 'a .gguf file'."""
    plural: ClassVar[str]
    """What a message calls several: '.gguf files'."""
    packages: ClassVar[dict[str, str]]
    """What a device needs to run it: {package: the module that it gives}. Empty: no device is expected to run it."""
    kv_default: ClassVar[str | None]
    """The type of the KV cache where none is asked for. None: only the runtime knows."""
    exported: ClassVar[bool]
    """Whether it was written for a runtime and ships as it is."""
    can_start: ClassVar[bool]
    """Whether passes can start from it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    @abstractmethod
    def recognises(cls, path: Path) -> bool:
        """Whether a path is of this format, by its name and by which files lie there. It need not exist."""

    @property
    @abstractmethod
    def tokenizer_folder(self) -> Path | None:
        """The folder from which transformers can read the tokenizer. None: the tokenizer is inside, for the runtime alone."""

    @abstractmethod
    def weight_files(self) -> list[Path]:
        """The files in which the weights lie."""

    @abstractmethod
    def deciding_files(self) -> list[Path]:
        """The files that decide what the model computes from token ids."""

    def source_files(self) -> list[Path]:
        """The files that decide what is made from it: the deciding files, and those of a tokenizer."""
        return self.deciding_files()

    def starts_quantized(self) -> bool:
        """Whether passes that start from it find codes. An exported file is dequantized before they start."""
        return False

    def files(self) -> list[Path]:
        """Every file."""
        return [self.path] if self.path.is_file() else [p for p in self.path.rglob("*") if p.is_file()]

    def sha256(self) -> str:
        """Who it is in a report: sha256 of a file; of a folder, of the names and sha256s of its deciding files."""
        from llmc.files import sha256

        files = self.deciding_files()
        if files == [self.path]:
            return sha256(self.path)
        return hashlib.sha256("".join(f"{p.name} {sha256(p)}\n" for p in sorted(files)).encode()).hexdigest()

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """Every weight, in the order of the file."""

    def weigh(self) -> Size:
        """Sizes, by headers alone."""
        from llmc.families.names import CLASSES

        found = self.tensors()
        if not found:
            raise UserError(f"{self.path} holds no tensors", "make or download it again")
        classes: dict[str, ClassSize] = {k: {"bytes": 0, "parameters": 0, "types": []} for k in CLASSES}
        types: dict[str, int] = {}
        matrices: dict[str, int] = {}
        for t in found:
            if t.kind != "other" and t.name.endswith("weight"):
                matrices[t.type] = matrices.get(t.type, 0) + 1
            c = classes[t.kind]
            c["bytes"] += t.nbytes
            c["parameters"] += t.parameters
            c["types"] = sorted({*c["types"], t.type})
            types[t.type] = types.get(t.type, 0) + t.nbytes
        tied = classes["head"]["parameters"] == 0
        tensor_bytes = sum(t.nbytes for t in found)
        parameters = sum(t.parameters for t in found)
        decoder = [classes["attention"], classes["mlp"]]
        decoder_parameters = sum(c["parameters"] for c in decoder)
        return {
            "file_bytes": sum(p.stat().st_size for p in self.weight_files()),
            "tensor_bytes": tensor_bytes, "parameters": parameters,
            "bits_per_weight": 8 * tensor_bytes / parameters,
            "decoder_bits_per_weight": 8 * sum(c["bytes"] for c in decoder) / max(1, decoder_parameters),
            "token_bytes": tensor_bytes - (0 if tied else classes["embedding"]["bytes"]),
            "tied": tied, "types": dict(sorted(types.items())), "matrices": dict(sorted(matrices.items())),
            "classes": classes,
        }

    @abstractmethod
    def shape(self) -> dict[str, int]:
        """{'layers', 'heads' (most of any layer), 'vocabulary'}."""

    @abstractmethod
    def kv_shape(self) -> KvShape | None:
        """The shape of the KV cache. None where the artifact does not tell it."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What `llmc inspect` shows: {'format', 'architecture', 'model': {'layers', 'hidden', 'heads', 'kv_heads', 'context'
        (tokens that it was trained for)}, 'type', 'tokenizer', 'licence'} and what only this format tells. Keys that the
        artifact does not tell are None."""

    @abstractmethod
    def problems(self) -> Iterator[str]:
        """Why it does not hold together, one line each. All weights are read."""


def collected(problems: list[str], check: Callable[[], Any]) -> Any:
    """The result of a check; the UserError that stops it becomes one of the problems."""
    try:
        return check()
    except UserError as e:
        problems.append(e.problem)
        return None
