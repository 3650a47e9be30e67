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
    parameters: int  # number of weights
    types: list[str]  # stored types, sorted


class Size(TypedDict):
    """The sizes of an artifact."""

    file_bytes: int  # of the weight files on disk
    tensor_bytes: int  # of the tensors only
    parameters: int  # number of weights of all tensors
    bits_per_weight: float  # 8 * tensor_bytes / parameters
    decoder_bits_per_weight: float  # of attention, MLP and all other matrices of the decoder layers
    # that decoding one token reads: all tensors except an untied embedding and the experts that the token does not use
    token_bytes: int
    token_parameters: NotRequired[int]  # number of these weights; missing in reports of earlier versions
    tied: bool  # the embedding is also the head
    types: dict[str, int]  # bytes by stored type
    matrices: NotRequired[dict[str, int]]  # number of matrices by stored type; missing in reports of earlier versions
    classes: dict[str, ClassSize]  # by each of CLASSES


class Artifact(ABC):
    """An artifact on disk. Creating the object reads nothing. The methods read headers and metadata; a method that reads
    weights says so. All methods raise UserError if the artifact is damaged."""

    format: ClassVar[str]
    """'gguf', 'onnx' or 'hf', as in manifests and reports."""
    label: ClassVar[str]
    """One artifact of this format in a message: 'a .gguf file'."""
    plural: ClassVar[str]
    """Several of them in a message: '.gguf files'."""
    packages: ClassVar[dict[str, str]]
    """The packages that a device needs to run it: {package: module to import}. Empty if devices do not run this format."""
    kv_default: ClassVar[str | None]
    """The default type of the KV cache. None if only the runtime knows it."""
    exported: ClassVar[bool]
    """Whether an export writes this format. Such a file ships unchanged."""
    can_start: ClassVar[bool]
    """Whether a pass accepts it as its input model."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    @abstractmethod
    def recognises(cls, path: Path) -> bool:
        """Whether a path has this format, judged by its name and the files in it. The path need not exist."""

    @property
    @abstractmethod
    def tokenizer_folder(self) -> Path | None:
        """The folder from which transformers can read the tokenizer. None if only the runtime can read the tokenizer."""

    @abstractmethod
    def weight_files(self) -> list[Path]:
        """The files that hold the weights."""

    @abstractmethod
    def deciding_files(self) -> list[Path]:
        """The files that determine the logits for given token ids."""

    def source_files(self) -> list[Path]:
        """The files that determine the result of a pass on this artifact: the deciding files and the tokenizer files."""
        return self.deciding_files()

    def starts_quantized(self) -> bool:
        """Whether a pass on it reads quantized weights. False for exported files: llmc dequantizes them first."""
        return False

    def files(self) -> list[Path]:
        """All files of the artifact."""
        return [self.path] if self.path.is_file() else [p for p in self.path.rglob("*") if p.is_file()]

    def sha256(self) -> str:
        """The hash that identifies the artifact in reports. It is the sha256 of the file, or for a folder the sha256 over the
        names and sha256s of its deciding files."""
        from llmc.files import sha256

        files = self.deciding_files()
        if files == [self.path]:
            return sha256(self.path)
        return hashlib.sha256("".join(f"{p.name} {sha256(p)}\n" for p in sorted(files)).encode()).hexdigest()

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """Every weight, in the order of the file."""

    def weigh(self) -> Size:
        """Sizes, read from headers only."""
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
        decoder = [t for t in found if t.in_decoder]
        decoder_parameters = sum(t.parameters for t in decoder)
        read = [t for t in found if tied or t.kind != "embedding"]
        return {
            "file_bytes": sum(p.stat().st_size for p in self.weight_files()),
            "tensor_bytes": tensor_bytes, "parameters": parameters,
            "bits_per_weight": 8 * tensor_bytes / parameters,
            "decoder_bits_per_weight": 8 * sum(t.nbytes for t in decoder) / max(1, decoder_parameters),
            "token_bytes": sum(t.token_bytes for t in read), "token_parameters": sum(t.token_parameters for t in read),
            "tied": tied, "types": dict(sorted(types.items())), "matrices": dict(sorted(matrices.items())),
            "classes": classes,
        }

    @abstractmethod
    def shape(self) -> dict[str, int]:
        """{'layers', 'heads' (maximum over the layers), 'vocabulary'}."""

    @abstractmethod
    def kv_shape(self) -> KvShape | None:
        """The shape of the KV cache. None if the artifact does not state it."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """The facts that `llmc inspect` shows: {'format', 'architecture', 'model': {'layers', 'hidden', 'heads', 'kv_heads',
        'context' (maximum length in tokens)}, 'type', 'tokenizer', 'licence'} and keys of this format only. A value is None
        if the artifact does not state it."""

    @abstractmethod
    def problems(self) -> Iterator[str]:
        """Errors and contradictions in the artifact, one line each. Reads all weights."""


def collected(problems: list[str], check: Callable[[], Any]) -> Any:
    """Returns the result of `check`. If it raises UserError, adds the message to `problems` and returns None."""
    try:
        return check()
    except UserError as e:
        problems.append(e.problem)
        return None
