"""An ONNX folder, which ONNX Runtime runs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from llmc.errors import UserError
from llmc.formats.artifact import Artifact, collected
from llmc.formats.genai_config import AGAIN
from llmc.formats.onnx_folder import GENAI, OnnxFolder, is_onnx_folder, open_onnx

if TYPE_CHECKING:
    from llmc.formats.kv import KvShape
    from llmc.formats.tensors import Tensor

# {key in genai_config.json: key in a Hugging Face config}
NAMES = {"num_hidden_layers": "num_hidden_layers", "num_key_value_heads": "num_key_value_heads", "head_size": "head_dim",
         "num_attention_heads": "num_attention_heads", "hidden_size": "hidden_size"}


class OnnxArtifact(Artifact):
    format, label, plural = "onnx", "an ONNX folder", "ONNX folders"
    packages: ClassVar = {"numpy": "numpy", "onnxruntime": "onnxruntime", "onnx": "onnx", "tokenizers": "tokenizers"}
    kv_default = None
    exported, can_start = True, False

    @classmethod
    def recognises(cls, path: Path) -> bool:
        return is_onnx_folder(path)

    @property
    def tokenizer_folder(self) -> Path:
        return self.path

    def weight_files(self) -> list[Path]:
        source = self._open()
        return [source.model, *source.data_files]

    def deciding_files(self) -> list[Path]:
        return self._open().files

    def tensors(self) -> list[Tensor]:
        from llmc.formats.onnx_tensors import tensors

        return list(tensors(self._open()))

    def shape(self) -> dict[str, int]:
        source = self._open()
        model = source.genai.get("model", {})
        decoder, config = model.get("decoder", {}), source.config
        found: dict[str, Any] = {
            "layers": decoder.get("num_hidden_layers") or config.get("num_hidden_layers"),
            "heads": decoder.get("num_attention_heads") or config.get("num_attention_heads"),
            "vocabulary": model.get("vocab_size") or config.get("vocab_size")}
        if lacking := [name for name, value in found.items() if not isinstance(value, int)]:
            raise UserError(f"neither {GENAI} nor config.json of {self.path} gives the number of {', '.join(lacking)}", AGAIN)
        return {name: int(value) for name, value in found.items()}

    def kv_shape(self) -> KvShape | None:
        from llmc.formats.kv import shape_of_config

        source = self._open()
        config, decoder = source.config, source.genai.get("model", {}).get("decoder", {})
        return shape_of_config(config | config.get("text_config", {})
                               | {hf_key: decoder[key] for key, hf_key in NAMES.items() if key in decoder})

    def facts(self) -> dict[str, Any]:
        """Adds 'operators' and 'matmul_nbits' (see OnnxFolder) and 'notes' (see onnx_lint)."""
        from llmc.formats.onnx_lint import as_notes, lint
        from llmc.formats.source import front_matter
        from llmc.formats.tokenizer_facts import of_folder

        source = self._open()
        model, config = source.genai.get("model", {}), source.config
        decoder = model.get("decoder", {})
        opsets = {o.domain or "ai.onnx": o.version for o in source.proto.opset_import}
        types = {t.type for t in self.tensors() if t.kind in ("attention", "mlp") and "int" in t.type}
        return {
            "format": "ONNX folder, " + ", ".join(f"{domain} {version}" for domain, version in opsets.items()),
            "architecture": model.get("type") or (config.get("architectures") or [config.get("model_type")])[0],
            "model": {
                "layers": decoder.get("num_hidden_layers") or config.get("num_hidden_layers"),
                "hidden": decoder.get("hidden_size") or config.get("hidden_size"),
                "heads": decoder.get("num_attention_heads") or config.get("num_attention_heads"),
                "kv_heads": decoder.get("num_key_value_heads") or config.get("num_key_value_heads"),
                "context": source.context,
            },
            "type": " + ".join(sorted(types)) or None,
            "operators": source.operators(),
            "matmul_nbits": source.matmul_nbits(),
            "notes": as_notes(lint(source.model)),
            "tokenizer": of_folder(self.path, model.get("vocab_size") or config.get("vocab_size")),
            "licence": front_matter(self.path / "README.md").get("license"),
        }

    def problems(self) -> Iterator[str]:
        """A damaged graph, external data that is missing or outside the folder, and float weights that are not finite."""
        import numpy as np
        from onnx import TensorProto

        source = self._open()
        problems: list[str] = []
        floats = (TensorProto.FLOAT, TensorProto.FLOAT16)
        for tensor in source.proto.graph.initializer:
            values = collected(problems, partial(source.array, tensor))
            if values is not None and tensor.data_type in floats and not np.isfinite(values).all():
                problems.append(f"{tensor.name} holds NaN or infinite values")
        yield from problems

    def _open(self) -> OnnxFolder:
        return open_onnx(self.path)
