"""A .gguf file, which llama.cpp runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from llmc.errors import UserError
from llmc.formats.artifact import Artifact

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

    from llmc.formats.chat_template import Template
    from llmc.formats.kv import KvShape
    from llmc.formats.tensors import Tensor


class GgufArtifact(Artifact):
    format, label, plural = "gguf", "a .gguf file", ".gguf files"
    packages: ClassVar = {"numpy": "numpy", "llama-cpp-python": "llama_cpp"}
    kv_default = "f16"
    exported = can_start = True

    @classmethod
    def recognises(cls, path: Path) -> bool:
        return path.suffix == ".gguf" and not path.is_dir()

    @property
    def tokenizer_folder(self) -> None:
        return None

    def weight_files(self) -> list[Path]:
        """Of a split file: all its parts."""
        from llmc.formats.gguf_check import parts

        return parts(self.path)

    def deciding_files(self) -> list[Path]:
        return self.weight_files()

    def files(self) -> list[Path]:
        return self.weight_files()

    def tensors(self) -> list[Tensor]:
        from llmc.families.names import classify
        from llmc.formats.experts import share, used_of
        from llmc.formats.tensors import Tensor

        used = share(self._own("expert_count"), self._own("expert_used_count"))
        return [Tensor(t.name, classify(t.name), t.tensor_type.name, int(t.n_elements), int(t.n_bytes),
                       used_of(t.name, used), axes=sum(int(n) > 1 for n in t.shape))
                for t in self._entries()]

    def _entries(self) -> list[ReaderTensor]:
        """The tensors of all parts."""
        from llmc.formats.gguf import open_gguf

        return [t for part in self.weight_files() for t in open_gguf(part).tensors]

    def shape(self) -> dict[str, int]:
        heads = self._own("attention.head_count")
        embedding = next((t for t in self._entries() if t.name == "token_embd.weight"), None)
        layers = self._own("block_count")
        if embedding is None or not layers or not heads:
            raise UserError(f"{self.path} is not a language model: it has no token_embd.weight, block_count or head_count",
                            "give the .gguf file of the model itself")
        return {"layers": int(layers), "vocabulary": int(embedding.shape[1]),
                "heads": int(max(heads) if isinstance(heads, list) else heads)}  # a list has a value for each layer

    def kv_shape(self) -> KvShape | None:
        """Sliding layers count as full: most files do not list them, and llama.cpp by default caches every token for them
        too."""
        layers, heads = self._own("block_count"), self._own("attention.head_count")
        kv_heads = self._own("attention.head_count_kv") or heads
        if not layers or not heads or self._own("attention.kv_lora_rank") is not None:
            return None
        per_layer = [int(n) for n in kv_heads] if isinstance(kv_heads, list) else [int(kv_heads)]
        most = max(per_layer)
        if any(n not in (0, most) for n in per_layer):
            return None
        head_dim = self._own("attention.key_length") or int(self._own("embedding_length")) // int(heads)
        cached = sum(n > 0 for n in per_layer) if isinstance(kv_heads, list) else int(layers)
        return {"layers": cached, "kv_heads": most, "head_dim": int(head_dim), "window": None,
                "sliding_layers": 0}

    def facts(self) -> dict[str, Any]:
        """Adds 'metadata': all values that are not lists."""
        from llmc.formats.chat_template import hash_template

        reader = self._reader()
        tokens = reader.get_field("tokenizer.ggml.tokens")
        blocks = {t.tensor_type.name for t in self._entries() if t.name.startswith("blk.") and len(t.shape) > 1}
        return {
            "format": f"GGUF version {self._field('GGUF.version')}",
            "architecture": self._field("general.architecture"),
            "model": {
                "layers": self._own("block_count"),
                "hidden": self._own("embedding_length"),
                "heads": self._own("attention.head_count"),
                "kv_heads": self._own("attention.head_count_kv"),
                "context": self._own("context_length"),
            },
            "type": " + ".join(sorted(blocks)) or None,
            "tokenizer": {
                "model": self._field("tokenizer.ggml.model"), "pre": self._field("tokenizer.ggml.pre"),
                "vocabulary": None if tokens is None else len(tokens.data), "eos": self._end_ids(),
                "chat_template_sha256": hash_template(self._template()),
            },
            "licence": self._field("general.license"),
            "metadata": {k: v for k in reader.fields if not k.startswith(("GGUF.", "tokenizer.chat_template"))
                         and not isinstance(v := self._field(k), list)},
        }

    def problems(self) -> Iterator[str]:
        """A file without tensors, and what llama.cpp could not run. A truncated file raises UserError when it is opened."""
        from llmc.formats.gguf_check import faults
        from llmc.formats.gguf_header import read_header

        if not self._entries():
            yield f"{self.path.name} holds no tensors"
        elif self._field("general.type") in (None, "model"):
            yield from faults(read_header(self.path))

    def _reader(self) -> GGUFReader:
        from llmc.formats.gguf import open_gguf

        return open_gguf(self.path)

    def _field(self, key: str) -> Any:
        from llmc.formats.gguf import field

        return field(self._reader(), key)

    def _template(self) -> Template | None:
        from llmc.formats.gguf import templates

        return templates(self._reader(), self.path)

    def _own(self, key: str) -> Any:
        """A metadata value whose key starts with the architecture's name."""
        return self._field(f"{self._field('general.architecture')}.{key}")

    def _end_ids(self) -> list[int]:
        ids = (self._field(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
        return sorted({i for i in ids if i is not None})
