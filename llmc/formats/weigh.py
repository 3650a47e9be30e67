"""What an artifact weighs: bytes and bits per weight, in all and by class of tensor. Only headers are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmc.errors import UserError
from llmc.families.names import CLASSES, classify
from llmc.formats.onnx_folder import is_onnx_folder, open_onnx


@dataclass(frozen=True)
class Tensor:
    """One weight: a stored tensor, or the tensors of a quantized linear taken together."""

    name: str
    kind: str
    """One of CLASSES."""
    type: str
    """'F32', 'BF16', 'Q4_0', 'GPTQ int4', …; llmc's blocks have their GGUF type's name."""
    parameters: int
    nbytes: int


def tensors(artifact: Path) -> list[Tensor]:
    """Every weight of a folder (float, quantized or ONNX) or a .gguf file, in file order."""
    if is_onnx_folder(artifact):
        from llmc.formats import weigh_onnx

        return list(weigh_onnx.tensors(open_onnx(artifact)))
    if artifact.is_dir():
        return list(_folder_tensors(artifact))
    if artifact.suffix == ".gguf" and artifact.is_file():
        from llmc.formats.gguf import open_gguf

        return [Tensor(t.name, classify(t.name), t.tensor_type.name, int(t.n_elements), int(t.n_bytes))
                for t in open_gguf(artifact).tensors]
    raise UserError(f"{artifact} is neither a model folder nor a .gguf file", "give one of these")


def _folder_tensors(folder: Path) -> Iterator[Tensor]:
    from llmc.formats.checkpoint import Checkpoint

    ckpt = Checkpoint.open(folder)
    quantization = ckpt.quantization or {}
    bits = quantization.get("bits", 0)
    for name in ckpt.names():
        linear, _, part = name.rpartition(".")
        if part == "blocks" and quantization.get("quant_method") == "llmc-blocks":
            from llmc.formats.blocks import shape, type_of

            out, width = shape(ckpt, linear)
            yield Tensor(f"{linear}.weight", classify(linear), type_of(ckpt, linear).gguf_type, out * width,
                         ckpt.nbytes(name))
        elif f"{linear}.qweight" not in ckpt:
            n = 1
            for d in ckpt.shape(name):
                n *= d
            yield Tensor(name, classify(name), ckpt.dtype(name), n, ckpt.nbytes(name))
        elif part == "bias":
            yield Tensor(name, classify(name), ckpt.dtype(name), ckpt.shape(name)[0], ckpt.nbytes(name))
        elif part == "qweight":
            words, out = ckpt.shape(name)
            packed = [f"{linear}.{p}" for p in ("qweight", "qzeros", "scales", "g_idx") if f"{linear}.{p}" in ckpt]
            yield Tensor(f"{linear}.weight", classify(linear), f"GPTQ int{bits}", words * out * 32 // bits,
                         sum(ckpt.nbytes(p) for p in packed))


def weigh(artifact: Path) -> dict[str, Any]:
    """Sizes of an artifact.

    file_bytes: of the weight file(s) on disk    tensor_bytes: of the tensors alone    parameters: their elements
    bits_per_weight: 8 * tensor_bytes / parameters    decoder_bits_per_weight: of attention and MLP matrices alone
    token_bytes: what one decoded token must read: every tensor but the embedding rows of other tokens
    tied: the embedding is the output head    types: bytes by stored type    matrices: how many of each type
    classes: {class: {bytes, parameters, types}} for each of CLASSES
    """
    found = tensors(artifact)
    if not found:
        raise UserError(f"{artifact} holds no tensors", "make or download it again")
    classes: dict[str, dict[str, Any]] = {k: {"bytes": 0, "parameters": 0, "types": []} for k in CLASSES}
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
        "file_bytes": sum(p.stat().st_size for p in weight_files(artifact)),
        "tensor_bytes": tensor_bytes, "parameters": parameters,
        "bits_per_weight": 8 * tensor_bytes / parameters,
        "decoder_bits_per_weight": 8 * sum(c["bytes"] for c in decoder) / max(1, decoder_parameters),
        "token_bytes": tensor_bytes - (0 if tied else classes["embedding"]["bytes"]),
        "tied": tied, "types": dict(sorted(types.items())), "matrices": dict(sorted(matrices.items())),
        "classes": classes,
    }


def weight_files(artifact: Path) -> list[Path]:
    """The files in which an artifact's weights lie."""
    if is_onnx_folder(artifact):
        source = open_onnx(artifact)
        return [source.model, *source.data_files]
    return [artifact] if artifact.is_file() else sorted(artifact.glob("*.safetensors"))
