"""The memory of an artifact in its own runtime, from headers: terms in bytes, as of llmc/memory.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmc.formats import kv
from llmc.formats.artifact import Artifact
from llmc.formats.artifacts.table import artifact_at
from llmc.memory import LLAMA_CPP, ONNX_RUNTIME

FLOAT = 4
BATCH = 512  # tokens that llama.cpp and OnnxModel run at once
LOGITS_BYTES = 128 << 20  # of one batch, in LlamaCpp and OnnxModel
# Types that llama.cpp repacks (copies in another order) for the CPU. The mapped file stays in memory too. REPACKED: on x86
# and on ARM. REPACKED_SOMEWHERE: on at least one of them (ggml/src/ggml-cpu/repack.cpp, ggml_repack_get_optimal_repack_type).
REPACKED = {"Q4_0", "Q4_K", "IQ4_NL"}
REPACKED_SOMEWHERE = {*REPACKED, "Q2_K", "Q5_K", "Q6_K", "Q8_0"}
ONNX_FLOATS = {"FLOAT16", "BFLOAT16", "F16", "BF16"}


@dataclass(frozen=True)
class Held:
    """terms: bytes by what they are for.  once: pages of files that are read once, while the model is loaded."""

    terms: dict[str, int]
    once: int = 0


def held(path: Path, tokens: int, scored: int, kv_type: str | None = None, repacks: bool = True) -> Held:
    """A runtime that has computed the logits of `scored` of `tokens` tokens, and holds their array.

    kv_type: of the cache.  repacks: whether llama.cpp repacks weights here (runtimes/amx.py)."""
    opened = artifact_at(path)
    size, shape = opened.weigh(), opened.shape()
    vocabulary = shape["vocabulary"]
    found = {"gguf": _llama_cpp, "onnx": _onnxruntime, "hf": _torch}[opened.format]
    own = found(opened, min(tokens, BATCH), vocabulary, repacks)
    cache = opened.kv_shape()
    cached = kv.bytes_at(cache, tokens, kv_type or "f32") if cache and opened.format != "hf" else 0
    widest = _widest(opened, size["parameters"], vocabulary)
    at_once = tokens if opened.format == "hf" else min(tokens, BATCH)
    return Held({**own.terms, "KV cache": cached, "activations": FLOAT * at_once * 6 * widest,
                 "logits": FLOAT * scored * vocabulary}, own.once)


def _widest(opened: Artifact, parameters: int, vocabulary: int) -> int:
    """The widest side of a matrix of the layers, if its other side is the width of the residual stream."""
    tensors = opened.tensors()
    embedding = next((t.parameters for t in tensors if t.kind == "embedding"), parameters)
    hidden = max(1, embedding // vocabulary)
    return max((t.parameters // hidden for t in tensors if t.kind in ("attention", "mlp")), default=hidden)


def _torch(opened: Artifact, batch: int, vocabulary: int, repacks: bool) -> Held:
    """`load_torch_model` in float32. A float file is mapped until every tensor is converted."""
    size = opened.weigh()
    converted = 0 if set(size["types"]) == {"F32"} else size["file_bytes"]
    return Held({"weights in float32": FLOAT * size["parameters"]}, converted)


def _llama_cpp(opened: Artifact, batch: int, vocabulary: int, repacks: bool) -> Held:
    """The mapped file, the copies of repacked matrices, and the logits of a batch: in the graph and in its output."""
    size = opened.weigh()
    rows = max(1, min(batch, LOGITS_BYTES // (FLOAT * vocabulary)))
    copies = sum(n for kind, n in size["types"].items() if kind in REPACKED) if repacks else 0
    return Held({"llama.cpp": LLAMA_CPP, "the mapped file": size["file_bytes"], "repacked matrices": copies,
                 "logits of a batch": 2 * FLOAT * rows * vocabulary})


def _onnxruntime(opened: Artifact, batch: int, vocabulary: int, repacks: bool) -> Held:
    """The packed matrices; float16 ones become float32 when the file is loaded, and are packed then. The embedding stays
    mapped. While it packs, the file is mapped too."""
    size = opened.weigh()
    rows = max(1, min(batch, LOGITS_BYTES // (FLOAT * vocabulary)))
    packed = sum(FLOAT * t.parameters if t.type in ONNX_FLOATS else t.nbytes
                 for t in opened.tensors() if t.kind != "embedding" or size["tied"])
    return Held({"ONNX Runtime": ONNX_RUNTIME, "packed matrices": packed,
                 "logits of a batch": 2 * FLOAT * rows * vocabulary}, size["file_bytes"])
